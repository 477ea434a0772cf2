"""The measuring commands of `antares`: simulate, bench, profile.

Each command imports heavy packages in its body, so that `antares --help` starts fast.
"""

from __future__ import annotations

import typer

from lab.bench.cli import bench
from lab.profile.cli import profile
from lab.simulate.cli import simulate

app = typer.Typer(
    name="antares",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (simulate, bench, profile):
    app.command()(command)

if __name__ == "__main__":
    app(prog_name="antares")
