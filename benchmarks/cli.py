"""The measuring commands of `antares`: simulate, bench, profile. Heavy imports happen inside them."""

from __future__ import annotations

import typer

from benchmarks.bench_cli import bench
from benchmarks.profile_cli import profile
from benchmarks.simulate_cli import simulate

app = typer.Typer(
    name="antares",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (simulate, bench, profile):
    app.command()(command)


def main() -> None:
    """Entry point of ``python -m benchmarks.cli``, which `antares` steps aside for."""
    app(prog_name="antares")


if __name__ == "__main__":
    main()
