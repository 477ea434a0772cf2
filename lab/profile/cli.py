"""`antares profile`: create a step-time profile from an engine or from published kernel timings, or show one."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console

if TYPE_CHECKING:
    from engine_adapter.step_time.profile import Profile
    from engine_adapter.step_time.profile_fit import Steps

console = Console(stderr=True, highlight=False)


def profile(
    from_engine: Annotated[
        str | None,
        typer.Option(
            "--from-engine",
            metavar="URL|CONFIG",
            help="Measure a running server, or the first engine of a configuration file.",
        ),
    ] = None,
    from_aiconfigurator: Annotated[
        tuple[str, str] | None,
        typer.Option(metavar="MODEL SYSTEM", help="Fit NVIDIA's published kernel timings; no GPU needed."),
    ] = None,
    show: Annotated[str | None, typer.Option(help="Show a shipped profile or a .json file.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the new profile.")] = None,
    output: Annotated[Path | None, typer.Option(help="Output file.", show_default="NAME.json")] = None,
    seed: Annotated[int, typer.Option(help="Random seed of the measured steps and of the held-out choice.")] = 0,
    max_batch: Annotated[
        int, typer.Option(min=1, help="With --from-engine: maximum number of sequences in a batch.")
    ] = 64,
    tp: Annotated[int, typer.Option(min=1, help="With --from-aiconfigurator: tensor parallelism (GPUs).")] = 1,
    backend_version: Annotated[
        str | None, typer.Option(help="With --from-aiconfigurator: vLLM version of the timings.", show_default="latest")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document to stdout.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Plot predicted against measured step times to this file.")] = None,
) -> None:
    """Create or show a step-time profile: durations of engine steps, for the simulator and as a start for policies."""
    from engine_adapter.step_time.profile import load_profile, profile_names, save_profile

    if sum(source is not None for source in (from_engine, from_aiconfigurator, show)) != 1:
        _usage(
            "use exactly one of --from-engine URL|CONFIG, --from-aiconfigurator MODEL SYSTEM or --show NAME; "
            f"shipped profiles: {', '.join(profile_names())}"
        )
    if plot is not None and show is None:
        _require_matplotlib()
    if show is not None:
        try:
            found, held_out = load_profile(show), None
        except ValueError as error:
            _usage(str(error))
    elif from_engine is not None:
        found, held_out = _from_engine(from_engine, name or "measured", max_batch, seed)
    else:
        assert from_aiconfigurator is not None
        model, system = from_aiconfigurator
        named = name or f"{system}-{model.rsplit('/', 1)[-1].lower()}"
        found, held_out = _from_aiconfigurator(model, system, named, tp, backend_version, seed)
    if held_out is not None:
        path = output or Path(f"{found.name}.json")
        save_profile(found, path)
        console.print(f"Wrote {path}")
        if plot is not None:
            draw(found, held_out, plot)
            console.print(f"Wrote {plot}")
    _print(found, as_json)


def _from_engine(source: str, name: str, max_batch: int, seed: int) -> tuple[Profile, Steps]:
    from engine_adapter.engine import EngineLost, EngineStartError
    from lab.profile.from_engine import build_engine, profile_from_engine

    try:
        engine, description = build_engine(source)
    except ValueError as error:
        _usage(str(error))
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING)
    console.print("Starting the engine…")
    with _progress("Requests") as (start, advance):
        try:
            return asyncio.run(
                profile_from_engine(
                    engine, name, description, max_batch=max_batch, seed=seed, on_start=start, progress=advance
                )
            )
        except (EngineStartError, EngineLost, RuntimeError) as error:
            _fail(str(error))


def _from_aiconfigurator(
    model: str, system: str, name: str, tp: int, backend_version: str | None, seed: int
) -> tuple[Profile, Steps]:
    from lab.profile.from_aiconfigurator import STEPS_PER_KIND, profile_from_aiconfigurator

    # The library warns about tables that a profile does not need.
    logging.getLogger("aiconfigurator_core").setLevel(logging.ERROR)
    with _progress("Steps") as (start, advance):
        start(3 * STEPS_PER_KIND)
        try:
            return profile_from_aiconfigurator(
                model,
                system,
                name,
                tp=tp,
                backend_version=backend_version,
                seed=seed,
                progress=lambda: advance(1),
            )
        except ImportError:
            _fail("--from-aiconfigurator needs NVIDIA's kernel timings: pip install -e '.[profile]' in your clone")
        except ValueError as error:
            _usage(str(error))
        except RuntimeError as error:
            _fail(f"aiconfigurator cannot time {model} on {system}: {error}")


@contextlib.contextmanager
def _progress(label: str) -> Iterator[tuple[Callable[[int], None], Callable[[int], None]]]:
    """Show a progress bar on stderr. Yields a function that sets the total, and one that advances it."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(label, total=None)

        def start(total: int) -> None:
            bar.update(task, total=total)

        def advance(count: int) -> None:
            bar.advance(task, count)

        yield start, advance


def draw(profile: Profile, held_out: Steps, path: Path) -> None:
    """Plot predicted against measured step times of ``held_out`` (ms) to ``path``."""
    from matplotlib.figure import Figure

    predicted, measured = held_out.predicted(profile) * 1000, held_out.seconds * 1000
    figure = Figure(figsize=(6, 6), layout="constrained")
    axes = figure.add_subplot()
    kinds = {
        "decode only": held_out.prefill_tokens == 0,
        "prefill only": held_out.decodes == 0,
        "both": (held_out.prefill_tokens > 0) & (held_out.decodes > 0),
    }
    for kind, mask in kinds.items():
        axes.scatter(measured[mask], predicted[mask], s=8, alpha=0.5, label=kind)
    shortest, longest = float(measured.min()), float(measured.max())
    axes.plot([shortest, longest], [shortest, longest], color="black", linewidth=0.8)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="measured step time (ms)",
        ylabel="predicted step time (ms)",
        title=profile.name,
    )
    axes.legend()
    figure.savefig(path, dpi=150)


def _print(found: Profile, as_json: bool) -> None:
    if as_json:
        from engine_adapter.step_time.profile import profile_document

        json.dump(profile_document(found), sys.stdout, indent=2, ensure_ascii=False)
        sys.stdout.write("\n")
        return
    from rich.table import Table

    table = Table(title=found.name, show_header=False, title_justify="left")
    table.add_row("description", found.description)
    for key, value in found.provenance.items():
        table.add_row(key.replace("_", " "), _text(value))
    for key in ("max_num_seqs", "max_num_batched_tokens", "max_model_len", "kv_tokens"):
        table.add_row(key, f"{getattr(found, key):,}")
    table.add_row("regimes", ", ".join(_bound(r.up_to_tokens) for r in found.regimes))
    for kind, fit in found.quality.items():
        table.add_row(
            f"held-out {kind}",
            f"R2 {fit['r2']:.5f}, RMSE {fit['rmse_ms']:.3f} ms, MAPE {100 * fit['mape']:.2f}%, {fit['samples']} steps",
        )
    if not found.quality:
        table.add_row("held-out steps", "none: published coefficients without their data")
    times = found.step_times()
    table.add_row(
        "SCORPIO forms",
        f"ITL a {times.a:.3g}, b {times.b:.3g}, c {times.c:.3g}, d {times.d:.3g}; "
        f"prefill alpha {times.alpha:.3g}, beta {times.beta:.3g}, theta {times.theta:g}, delta {times.delta:.3g}",
    )
    Console().print(table)


def _bound(tokens: float) -> str:
    return "unlimited" if tokens == float("inf") else f"up to {tokens:g} tokens"


def _text(value: Any) -> str:
    return ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)


def _require_matplotlib() -> None:
    if find_spec("matplotlib") is None:
        _usage("--plot needs matplotlib: pip install -e '.[bench]' in your clone")


def _usage(message: str) -> NoReturn:
    typer.echo(f"antares profile: {message}", err=True)
    raise typer.Exit(2)


def _fail(message: str) -> NoReturn:
    typer.echo(f"antares profile: {message}", err=True)
    raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(profile)
