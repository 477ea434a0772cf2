"""What a figure is, and the JSON that it leaves behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.figures.lab import Lab

Document = dict[str, Any]
"""A figure's JSON: what `document` makes."""

LISTS = ("runs", "replays", "capacities", "timings")
"""Members that hold many records: one a line in the file."""


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure of the page.

    ``measure(lab, quick)`` runs it, at toy sizes if ``quick``; ``draw(document, folder)`` writes its PNGs and answers
    their names; ``section(document)`` is its text on the page, without the heading, lines of any length;
    ``headline(document)`` is one sentence.
    """

    name: str
    title: str
    measure: Callable[[Lab, bool], Document]
    draw: Callable[[Document, Path], list[str]]
    section: Callable[[Document], str]
    headline: Callable[[Document], str]


def document(name: str, seeds: tuple[int, ...], profiles: tuple[str, ...], **members: Any) -> Document:
    """A figure's JSON, with what every figure says of itself."""
    return {
        "figure": name,
        "simulated": True,
        "command": f"python -m benchmarks.figures --only {name}",
        "seeds": list(seeds),
        "profiles": list(profiles),
        **members,
    }


def save(made: Document, path: Path) -> None:
    """Write ``made`` as JSON, records one a line."""
    parts = []
    for key, value in made.items():
        if key in LISTS:
            lines = ",\n".join("    " + json.dumps(record) for record in value)
            parts.append(f'  "{key}": [\n{lines}\n  ]')
        else:
            parts.append(f'  "{key}": ' + json.dumps(value, indent=2).replace("\n", "\n  "))
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")
