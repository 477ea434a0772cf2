"""``python -m benchmarks.figures``: runs the simulations, draws the figures and writes the pages."""

from __future__ import annotations

import os
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from benchmarks import results_json
from benchmarks.command import chosen
from benchmarks.figures.catalogue import FIGURES
from benchmarks.figures.lab import laboratory
from benchmarks.figures.page import RESULTS, load, write_pages


def main(
    only: Annotated[list[str] | None, typer.Option(help="Run this figure; repeat for several. [default: all]")] = None,
    show: Annotated[bool, typer.Option("--list", help="List the figures and exit.")] = False,
    quick: Annotated[bool, typer.Option(help="Run at toy size, as a smoke test; needs --output.")] = False,
    output: Annotated[Path, typer.Option(help="Folder for JSON, PNGs and pages.")] = RESULTS,
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes. [default: one per core]")] = None,
    redraw: Annotated[bool, typer.Option(help="Draw and write pages from existing JSON; simulate nothing.")] = False,
) -> None:
    """Reproduce the simulated figures of docs/results."""
    if show:
        for figure in FIGURES.values():
            print(f"{figure.name:16}{figure.title}")
        return
    names = chosen("--only", only, FIGURES)
    if quick and output.resolve() == RESULTS.resolve():
        raise typer.BadParameter("--quick would overwrite docs/results with toy sizes: give --output")
    if find_spec("matplotlib") is None:
        print("figures need matplotlib: pip install -e '.[bench]' in your clone", file=sys.stderr)
        raise typer.Exit(1)
    output.mkdir(parents=True, exist_ok=True)
    with laboratory(jobs or os.cpu_count() or 1) as lab:
        for name in names:
            figure, started = FIGURES[name], time.perf_counter()
            if not redraw:
                results_json.write(figure.measure(lab, quick), output / f"{name}.json")
            documents = load(output)
            pictures = figure.draw(documents[name], output) if name in documents else []
            elapsed_s = time.perf_counter() - started
            print(f"{name}: {elapsed_s:.0f} s, {', '.join([f'{name}.json', *pictures])}", file=sys.stderr)
    try:
        for path in write_pages(output):
            print(f"wrote {path}", file=sys.stderr)
    except ValueError as error:
        print(error, file=sys.stderr)
        raise typer.Exit(1) from error


if __name__ == "__main__":
    app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
    app.command()(main)
    app(prog_name="python -m benchmarks.figures")
