"""The command-line options that the studies share, and how a study writes its results and its page.

`PageOf` writes the page from the JSON of an earlier run, so that a new wording needs no new measurement.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import results_json

Seeds = Annotated[int, typer.Option(min=1, help="Number of seeds, which are 0, 1, ...")]
Duration = Annotated[float, typer.Option(min=1, help="Seconds of arrivals.")]
Jobs = Annotated[int, typer.Option(min=1, help="Processes.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document to stdout.")]
JsonTo = Annotated[Path | None, typer.Option("--json", help="Write the results to this JSON file.")]
PageOf = Annotated[Path | None, typer.Option("--page", help="Write the page beside this JSON file; measure nothing.")]


def chosen(option: str, names: Sequence[str] | None, known: Collection[str]) -> list[str]:
    """Return ``names``, or all of ``known`` if none is chosen.

    Raises:
        typer.BadParameter: a name is unknown.
    """
    for name in names or ():
        if name not in known:
            raise typer.BadParameter(f"unknown name {name!r}: choose from {'; '.join(known)}", param_hint=option)
    return list(names or known)


def print_results(found: Mapping[str, Any], as_json: bool, page: Callable[[Any], str]) -> None:
    """Print ``found`` as JSON, or else as its page."""
    sys.stdout.write(results_json.dumps(found) if as_json else page(found))


def write_page(results: Path, page: Callable[[Any], str]) -> Any:
    """Write the page of the JSON file ``results`` beside it, and return the content of the file."""
    found = json.loads(results.read_text(encoding="utf-8"))
    results.with_suffix(".md").write_text(page(found), encoding="utf-8")
    return found
