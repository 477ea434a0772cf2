"""The parts of a figure, and its JSON document."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.figures.lab import Lab

Document = dict[str, Any]
"""The JSON of a figure, as made by `new_document`."""


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure of the page.

    - ``measure(lab, quick)`` runs the simulations, at toy size if ``quick``, and returns the document.
    - ``draw(document, folder)`` writes the PNGs and returns their names.
    - ``section(document)`` returns the page text without the heading, with lines of any length.
    - ``headline(document)`` returns one sentence for the index.
    """

    name: str
    title: str
    measure: Callable[[Lab, bool], Document]
    draw: Callable[[Document, Path], list[str]]
    section: Callable[[Document], str]
    headline: Callable[[Document], str]


def new_document(name: str, seeds: tuple[int, ...], profiles: tuple[str, ...], **members: Any) -> Document:
    """The document of figure ``name``: the members that all figures have, then ``members``."""
    return {
        "figure": name,
        "simulated": True,
        "command": f"python -m benchmarks.figures --only {name}",
        "seeds": list(seeds),
        "profiles": list(profiles),
        **members,
    }
