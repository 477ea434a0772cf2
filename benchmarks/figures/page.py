"""Writes docs/results/simulated.md with all figures, their list in the index, and the table in docs/planning.md."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from benchmarks.figures import capacity
from benchmarks.figures.catalogue import FIGURES
from benchmarks.figures.figure import Document
from benchmarks.markdown import anchor, with_block, wrapped

PAGE = "simulated.md"
INDEX = "README.md"
RESULTS = Path(__file__).parents[2] / "docs" / "results"
PLANNING = RESULTS.parent / "planning.md"

_HEAD = """# Simulated results

**Everything on this page is simulated.** No GPU was used. The gateway's own policies, admission and step gate run in
virtual time. Steps follow the rules of vLLM's scheduler and the times of a [profile](../profiles.md).
[docs/planning.md](../planning.md) lists what the simulation leaves out. The [index](README.md) links to the
measurements on a real engine.

`make figures` reproduces all numbers and pictures; `python -m benchmarks.figures --only NAME` reproduces one figure.
The same command writes the text from the same JSON, so text and numbers agree.

- *Attained*: the request finished and met its TTFT and TPOT bounds.
- *Goodput*: attained requests per second, from the start to the last answer.
- *Adherence*: attained over **all** requests. Rejected requests stay in the denominator.
- *Bounds*: no scheduler can exceed the count bound. No scheduler without a preference for cheap requests can exceed
the fair bound ([lab/bounds.py](../../lab/bounds.py)).
- *SLOs*: the paper's six categories for Llama-3.1-8B in equal shares (TTFT 0.5 to 7.5 s, TPOT 30 or 50 ms).
"""


def load(folder: Path) -> dict[str, Document]:
    """The documents in ``folder`` by figure name, in the order of the page."""
    return {
        name: json.loads((folder / f"{name}.json").read_text())
        for name in FIGURES
        if (folder / f"{name}.json").exists()
    }


def write_pages(folder: Path) -> list[Path]:
    """Write the page and the generated block of the index in ``folder``; return the files written.

    In docs/results this also writes the table in docs/planning.md.

    Raises:
        ValueError: a JSON file lacks a field because an older version wrote it; the message has the command that
            writes it again.
    """
    documents = load(folder)
    page, index = folder / PAGE, folder / INDEX
    page.write_text(page_text(documents), encoding="utf-8")
    old = index.read_text(encoding="utf-8") if index.exists() else "# Results\n"
    index.write_text(with_block(old, "simulated", index_text(documents)), encoding="utf-8")
    written = [page, index]
    if folder.resolve() == RESULTS.resolve() and "capacity" in documents:
        planning = PLANNING.read_text(encoding="utf-8")
        PLANNING.write_text(with_block(planning, "capacity", capacity.tables(documents["capacity"])), encoding="utf-8")
        written.append(PLANNING)
    return written


def page_text(documents: dict[str, Document]) -> str:
    """The page with one section per document."""
    parts = [wrapped(_HEAD) + "\n"]
    for name, document in documents.items():
        seeds = ", ".join(map(str, document["seeds"]))
        section = _text_of(name, FIGURES[name].section, document)
        label = "Seed" if len(document["seeds"]) == 1 else "Seeds"
        parts.append(
            f"## {FIGURES[name].title}\n\n{wrapped(section)}\n\n"
            f"{label} {seeds}; [{name}.json]({name}.json).\n\n```\n{document['command']}\n```\n"
        )
    return "\n".join(parts)


def _text_of(name: str, write: Callable[[Document], str], document: Document) -> str:
    try:
        return write(document)
    except LookupError as error:
        raise ValueError(f"{name}.json lacks {error}: an older version wrote it; run {document['command']}") from error


def index_text(documents: dict[str, Document]) -> str:
    """The block of the index: one line per document, with a link to its section and its headline."""
    intro = f"""No GPU was used: the gateway's own policies run in virtual time. [{PAGE}]({PAGE}) has pictures,
    tables, commands and seeds; `make figures` reproduces all of it."""
    lines = ["## Simulated, on step times of GPUs", "", wrapped(intro), ""]
    for name, document in documents.items():
        title, headline = FIGURES[name].title, _text_of(name, FIGURES[name].headline, document)
        lines.append(f"- [{title}]({PAGE}#{anchor(title)}): {headline}")
    return "\n".join(lines)
