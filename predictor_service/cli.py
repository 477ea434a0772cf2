"""``antares predictor train | evaluate | serve``.

Logs, tables and progress go to stderr; with ``--json`` stdout holds one JSON document. Exit 0 done, 1 failed,
2 bad usage. Everything heavy is imported inside the commands, so that ``--help`` is instant.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

app = typer.Typer(
    help="The output-length predictor: train it, measure it, serve it.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
)

ModelFolder = Annotated[
    Path | None,
    typer.Option("--model", help="Folder of a trained model; the shipped one by default.", show_default=False),
]


class LogLevel(StrEnum):
    """How much the service logs; prompts never."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


@app.command()
def train(
    output: Annotated[Path, typer.Option(help="Folder to write the model into.", file_okay=False)],
    seed: Annotated[int, typer.Option(help="Seed of the split by conversation.", min=0)] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the model card as JSON on stdout.")] = False,
) -> None:
    """Train the length model on ShareGPT (about a minute on one core; needs the extra 'train')."""
    from predictor_service.sharegpt import TrainingDataMissing
    from predictor_service.sharegpt_model import train_on_sharegpt

    try:
        with _progress() as progress:
            card = train_on_sharegpt(output, seed, progress)
    except (TrainingDataMissing, OSError) as failed:
        _fail(str(failed))
    _table(f"{card['model']}: held-out test split", card["metrics"]["test"])
    typer.echo(f"written to {output}", err=True)
    if as_json:
        _print_json(card)


@app.command()
def evaluate(
    model: ModelFolder = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
) -> None:
    """Measure a model on the ShareGPT conversations that its training held out (needs the extra 'train')."""
    from predictor_service.length_model import SHIPPED_MODEL, ModelUnusable, load_model
    from predictor_service.sharegpt import TrainingDataMissing
    from predictor_service.sharegpt_model import evaluate_on_sharegpt

    try:
        with _progress() as progress:
            metrics = evaluate_on_sharegpt(load_model(model or SHIPPED_MODEL), progress)
    except (TrainingDataMissing, ModelUnusable) as failed:
        _fail(str(failed))
    if as_json:
        _print_json(metrics)
    else:
        _table("held-out test split", metrics)


@app.command()
def serve(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=1, max=65535)] = 8101,
    model: ModelFolder = None,
    log_level: Annotated[LogLevel, typer.Option(help="How much to log.")] = LogLevel.INFO,
    batch_window_ms: Annotated[
        float, typer.Option(help="How long an idle service waits to batch calls.", min=0, max=100)
    ] = 1.0,
    max_waiting: Annotated[int, typer.Option(help="Inputs that may wait; beyond them, calls get 503.", min=1)] = 2048,
    exit_with_parent: Annotated[
        bool, typer.Option("--exit-with-parent", help="Stop once the starting process is gone.")
    ] = False,
) -> None:
    """Serve predictions over HTTP: POST /v1/predict, GET /health, GET /metrics."""
    from predictor_service.batching import BatchLimits
    from predictor_service.length_model import SHIPPED_MODEL, ModelUnusable
    from predictor_service.serve import CannotListen, run_server

    limits = BatchLimits(window_s=batch_window_ms / 1e3, max_waiting=max_waiting)
    try:
        run_server(
            host,
            port,
            model=model or SHIPPED_MODEL,
            limits=limits,
            log_level=log_level.value,
            exit_with_parent=exit_with_parent,
        )
    except (ModelUnusable, CannotListen) as failed:
        _fail(str(failed))


def _fail(message: str) -> NoReturn:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(1)


def _print_json(document: dict[str, Any]) -> None:
    import orjson

    typer.echo(orjson.dumps(document, option=orjson.OPT_INDENT_2).decode())


def _table(title: str, metrics: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name, value in metrics.items():
        table.add_row(name, str(value))
    Console(stderr=True).print(table)


@contextmanager
def _progress() -> Iterator[Callable[[str, float], None]]:
    """A progress bar a stage, on stderr; silent where stderr is no terminal."""
    from rich.console import Console
    from rich.progress import Progress, TaskID

    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as bars:
        stages: dict[str, TaskID] = {}

        def report(stage: str, share: float) -> None:
            if stage not in stages:
                stages[stage] = bars.add_task(stage, total=1.0)
                if not console.is_terminal:
                    typer.echo(f"{stage} ...", err=True)
            bars.update(stages[stage], completed=share)

        yield report


if __name__ == "__main__":
    app()
