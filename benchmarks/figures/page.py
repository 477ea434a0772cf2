"""The pages: docs/results/simulated.md with every figure, its entry in the index, and the table in docs/planning.md."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Callable
from pathlib import Path

from benchmarks.figures import capacity
from benchmarks.figures.catalogue import FIGURES
from benchmarks.figures.figure import Document

PAGE = "simulated.md"
INDEX = "README.md"
RESULTS = Path(__file__).parents[2] / "docs" / "results"
PLANNING = RESULTS.parent / "planning.md"

_AS_IT_IS = ("|", "!", "#", "`" * 3)
"""How a paragraph begins that is no prose."""

_HEAD = """# Simulated results

**Everything on this page is simulated.** No GPU was used. The gateway's own policies, admission and step gate ran in
virtual
time against the rules of vLLM's scheduler, each step as long as a [step-time profile](../profiles.md) says. What
that leaves
out is listed in [docs/planning.md](../planning.md). Measurements on a real engine stand in the [index](README.md).

`make figures` makes every number and picture here again; `python -m benchmarks.figures --only NAME` makes one. The
text is
written by the same command from the same JSON: a sentence with a number in it cannot be older than the number.

*Goodput* is attained requests per second from the start to the last answer, *adherence* attained over **all** requests:
what was rejected stays in the denominator. *Attained*: finished, first token and tokens both in time. *Bounds*: no
scheduler can pass the count bound, none that prefers no cheap requests the fair bound
([how](../../lab/bounds.py)).
The SLOs are the paper's six categories for Llama-3.1-8B (first token 0.5 to 7.5 s, tokens 30 or 50 ms apart), evenly
mixed.
"""


def load(folder: Path) -> dict[str, Document]:
    """The documents that are in ``folder``, by figure, in the page's order."""
    return {
        name: json.loads((folder / f"{name}.json").read_text())
        for name in FIGURES
        if (folder / f"{name}.json").exists()
    }


def write_pages(folder: Path) -> list[Path]:
    """Write the page and, around what else it holds, the index; in the repository's own folder docs/planning.md too.

    Raises:
        ValueError: a JSON file that other code made; the message says how to make it again.
    """
    documents = load(folder)
    page, index = folder / PAGE, folder / INDEX
    page.write_text(_page(documents), encoding="utf-8")
    old = index.read_text(encoding="utf-8") if index.exists() else "# Results\n"
    index.write_text(with_block(old, "simulated", _index(documents)), encoding="utf-8")
    written = [page, index]
    if folder.resolve() == RESULTS.resolve() and "capacity" in documents:
        planning = PLANNING.read_text(encoding="utf-8")
        PLANNING.write_text(with_block(planning, "capacity", capacity.tables(documents["capacity"])), encoding="utf-8")
        written.append(PLANNING)
    return written


def _page(documents: dict[str, Document]) -> str:
    parts = [_refilled(_HEAD) + "\n"]
    for name, made in documents.items():
        seeds = ", ".join(map(str, made["seeds"]))
        parts.append(
            f"## {FIGURES[name].title}\n\n{_refilled(_told(name, FIGURES[name].section, made))}\n\n"
            f"Seeds {seeds}; [{name}.json]({name}.json).\n\n```\n{made['command']}\n```\n"
        )
    return "\n".join(parts)


def _told(name: str, tell: Callable[[Document], str], made: Document) -> str:
    try:
        return tell(made)
    except LookupError as error:
        raise ValueError(f"{name}.json lacks {error}: other code made it; run {made['command']}") from error


def _refilled(text: str) -> str:
    """Paragraphs of prose at the width of the other pages; tables, pictures and code as they are."""
    parts = [part.strip("\n") for part in text.split("\n\n")]
    return "\n\n".join(part if part.startswith(_AS_IT_IS) else _fill(part) for part in parts if part)


def _fill(paragraph: str) -> str:
    words = " ".join(paragraph.split())
    return textwrap.fill(words, 120, break_long_words=False, break_on_hyphens=False)


def _index(documents: dict[str, Document]) -> str:
    intro = f"""No GPU was used: the gateway's own policies in virtual time. [{PAGE}]({PAGE}) has pictures, tables,
    commands and seeds; `make figures` makes all of it again."""
    lines = ["## Simulated, on step times of GPUs", "", _fill(intro), ""]
    for name, made in documents.items():
        title, headline = FIGURES[name].title, _told(name, FIGURES[name].headline, made)
        lines.append(f"- [{title}]({PAGE}#{anchor(title)}): {headline}")
    return "\n".join(lines)


def anchor(title: str) -> str:
    """What a heading is called in a link."""
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")


def with_block(text: str, name: str, block: str) -> str:
    """``text`` with what stands between the marks of ``name`` replaced; without marks, before the second heading."""
    marked = f"<!-- {name}:start -->\n{block}\n<!-- {name}:end -->"
    pattern = re.compile(rf"<!-- {name}:start -->.*?<!-- {name}:end -->", re.DOTALL)
    if pattern.search(text):
        return pattern.sub(lambda _: marked, text)
    head, heading, rest = text.partition("\n## ")
    return f"{head.rstrip()}\n\n{marked}\n{heading}{rest}"
