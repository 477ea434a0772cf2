"""Commands ``antares predictor train | evaluate | serve | collect``.

Logs, tables and progress go to stderr. With ``--json``, stdout holds one JSON document. Exit codes: 0 done, 1 failed,
2 bad usage. Heavy modules are imported inside the commands, so that ``--help`` is fast.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

app = typer.Typer(
    help="The output-length predictor: train, evaluate, serve, collect training data.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)

ModelFolder = Annotated[
    Path | None,
    typer.Option("--model", help="Folder of a trained model. Default: the shipped model.", show_default=False),
]


class LogLevel(StrEnum):
    """Log level of the service. Prompts are never logged."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class Family(StrEnum):
    """Family of a length model."""

    HASHED = "hashed"
    CLASSIFIER = "classifier"


class Binning(StrEnum):
    """Strategy for cutting lengths into bins."""

    EQUAL_WIDTH = "equal-width"
    EQUAL_FREQUENCY = "equal-frequency"


DataFile = Annotated[
    Path | None,
    typer.Option(
        "--data",
        help="JSONL file, or folder of them, with output lengths (docs/predictor.md). Default: ShareGPT.",
        exists=True,
        show_default=False,
    ),
]
Base = Annotated[
    str | None,
    typer.Option(help="Backbone of the classifier: a local folder or a Hugging Face name.", show_default=False),
]
Epochs = Annotated[int, typer.Option(help="Passes over the training data (classifier).", min=1)]
BatchRows = Annotated[int, typer.Option("--batch", help="Prompts per optimiser step (classifier).", min=1)]
LearningRate = Annotated[float, typer.Option(help="Constant learning rate of Adam (classifier).", min=0.0)]


@app.command()
def train(
    output: Annotated[Path, typer.Option(help="Folder for the model.", file_okay=False)],
    family: Annotated[
        Family, typer.Option(help="'hashed': fast on a CPU. 'classifier': SCORPIO's, a fine-tuned backbone.")
    ] = Family.HASHED,
    data: DataFile = None,
    seed: Annotated[int, typer.Option(help="Seed of training and of the split by conversation.", min=0)] = 0,
    base: Base = None,
    bins: Annotated[int, typer.Option(help="Number of length bins (classifier).", min=2, max=10_000)] = 100,
    strategy: Annotated[Binning, typer.Option(help="Strategy for cutting bins (classifier).")] = Binning.EQUAL_WIDTH,
    epochs: Epochs = 8,
    batch: BatchRows = 64,
    learning_rate: LearningRate = 2e-5,
    as_json: Annotated[bool, typer.Option("--json", help="Print the model card as JSON.")] = False,
) -> None:
    """Train a length model. The same command resumes an interrupted training.

    ShareGPT needs the extra 'train'. The CPU model takes about two minutes on one core.
    """
    from predictor_service.training import run as training_run
    from predictor_service.training.datasets import BadData
    from predictor_service.training.sharegpt import TrainingDataMissing

    if family is Family.HASHED and base is not None:
        raise typer.BadParameter("only --family classifier uses a backbone", param_hint="--base")
    try:
        with _progress() as progress:
            if family is Family.HASHED:
                card = training_run.train_hashed(output, seed, data, progress)
            else:
                recipe = _classifier_recipe(
                    base, bins=bins, strategy=strategy.value, epochs=epochs, batch=batch, learning_rate=learning_rate
                )
                card = training_run.train_classifier(output, replace(recipe, seed=seed), data, progress)
    except (TrainingDataMissing, BadData, ValueError, OSError) as error:
        _fail(str(error))
    _table(f"{card['model']}: test split", card["metrics"]["test"])
    typer.echo(f"wrote {output}", err=True)
    if as_json:
        _print_json(card)


@app.command()
def evaluate(
    model: ModelFolder = None,
    data: DataFile = None,
    bins: Annotated[
        bool, typer.Option("--bins", help="Run SCORPIO's bucket study instead: 10 to 1000 bins, both strategies.")
    ] = False,
    base: Base = None,
    epochs: Epochs = 8,
    batch: BatchRows = 64,
    learning_rate: LearningRate = 2e-5,
    as_json: Annotated[bool, typer.Option("--json", help="Print the metrics as JSON.")] = False,
) -> None:
    """Evaluate a model on conversations that are not in its training data. ShareGPT needs the extra 'train'.

    With --bins, a classifier (--model) or a backbone (--base) is fine-tuned again for each set of bins.
    """
    from predictor_service.model.length_model import SHIPPED_MODEL, ModelUnusable, load_model
    from predictor_service.training import run as training_run
    from predictor_service.training.datasets import BadData
    from predictor_service.training.sharegpt import TrainingDataMissing

    if base is not None and not bins:
        raise typer.BadParameter("only the bucket study uses a backbone: add --bins", param_hint="--base")
    try:
        loaded = load_model(model or SHIPPED_MODEL)
        if base is None and loaded.reads_text and model is not None:
            base = str(model / "backbone")
        with _progress() as progress:
            if not bins:
                metrics = training_run.evaluate_held_out(loaded, data, progress)
            else:
                recipe = base and _classifier_recipe(base, epochs=epochs, batch=batch, learning_rate=learning_rate)
                rows = training_run.study_buckets(loaded, data, recipe or None, progress)
    except (TrainingDataMissing, BadData, ModelUnusable, ValueError, OSError) as error:
        _fail(str(error))
    if as_json:
        _print_json({"model": base or loaded.name, "buckets": rows} if bins else metrics)
    elif bins:
        _rows(f"{base or loaded.name}: bucket study, held-out data", rows)
    else:
        _table(f"{loaded.name}: held-out data", metrics)


def _classifier_recipe(base: str | None, **options: Any) -> Any:
    """Return the recipe with these options. Ends the command if torch or transformers is not installed."""
    try:
        from predictor_service.training.fit_classifier import ClassifierRecipe
    except ImportError as error:
        _fail(f"the classifier family needs torch and transformers: {error.name} is not installed")
    return ClassifierRecipe(**options) if base is None else ClassifierRecipe(base=base, **options)


@app.command()
def serve(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=1, max=65535)] = 8101,
    model: ModelFolder = None,
    log_level: Annotated[LogLevel, typer.Option(help="Log level.")] = LogLevel.INFO,
    batch_window_ms: Annotated[
        float, typer.Option(help="Milliseconds that an idle service waits to batch calls.", min=0, max=100)
    ] = 1.0,
    max_waiting: Annotated[int, typer.Option(help="Inputs in the queue; calls beyond it fail with 503.", min=1)] = 2048,
    state: Annotated[
        Path | None, typer.Option(help="Folder for learned corrections, which then survive a restart.", file_okay=False)
    ] = None,
    collect_into: Annotated[
        Path | None,
        typer.Option(
            "--collect", help="Folder for training data: features and lengths of finished requests.", file_okay=False
        ),
    ] = None,
    collect_limit_mb: Annotated[int, typer.Option(help="Size limit of the folder of --collect, in MiB.", min=1)] = 256,
    only_model: Annotated[
        list[str] | None, typer.Option(help="Reject calls that name another served model; repeatable.")
    ] = None,
    exit_with_parent: Annotated[
        bool, typer.Option("--exit-with-parent", help="Stop when the parent process is gone.")
    ] = False,
) -> None:
    """Serve predictions over HTTP: POST /v1/predict, POST /v1/observe, GET /health, GET /metrics."""
    from predictor_service.calibration.state import StateUnusable
    from predictor_service.model.length_model import SHIPPED_MODEL, ModelUnusable
    from predictor_service.serving.batching import BatchLimits
    from predictor_service.serving.process import CannotListen, LearningFolders, run_server

    limits = BatchLimits(window_s=batch_window_ms / 1e3, max_waiting=max_waiting)
    try:
        run_server(
            host,
            port,
            model=model or SHIPPED_MODEL,
            limits=limits,
            folders=LearningFolders(state, collect_into, collect_limit_mb << 20),
            known_models=frozenset(only_model or ()),
            log_level=log_level.value,
            exit_with_parent=exit_with_parent,
        )
    except (ModelUnusable, CannotListen, StateUnusable, OSError) as error:
        _fail(str(error))


@app.command()
def collect(
    folder: Annotated[Path, typer.Argument(help="Folder of --collect.", file_okay=False)],
    output: Annotated[Path, typer.Option(help="JSONL file to write, for `train --data`.", dir_okay=False)],
    model: Annotated[str | None, typer.Option(help="Export only the answers of this served model.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the counts as JSON.")] = False,
) -> None:
    """Export the training data of `serve --collect`: features and lengths of finished requests, never text."""
    from predictor_service.serving.collecting import export

    if not folder.is_dir():
        _fail(f"there is no folder {folder}. Collect training data with  antares predictor serve --collect DIR")
    try:
        counts = export(folder, output, model)
    except OSError as error:
        _fail(str(error))
    if as_json:
        _print_json(counts)
    else:
        _table(f"wrote {output}", {f"{name}, finished requests": rows for name, rows in counts["models"].items()})


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


def _rows(title: str, rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for name in rows[0]:
        table.add_column(name)
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console(stderr=True).print(table)


@contextmanager
def _progress() -> Iterator[Callable[[str, float], None]]:
    """Show one progress bar for each stage on stderr; without a terminal, print only the name of each stage."""
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
