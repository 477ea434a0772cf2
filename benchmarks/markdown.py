"""Markdown for the generated pages: tables, wrapped text, anchors, and blocks between markers."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence

WIDTH = 120
"""Line length of the pages in docs, in characters."""

_NOT_PROSE = ("|", "!", "#", "<", "`" * 3)
"""First characters of a paragraph that is not wrapped: tables, pictures, headings, markers and code."""


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def policy_label(policy: str) -> str:
    """The name of a policy in tables."""
    return "`fcfs` (stock vLLM)" if policy == "fcfs" else f"`{policy}`"


def wrapped(text: str) -> str:
    """``text`` with its paragraphs and list items wrapped at `WIDTH`; tables, pictures and code unchanged.

    An empty line ends a paragraph, and code must not contain one.
    """
    parts = [part.strip("\n") for part in text.split("\n\n")]
    return "\n\n".join(part if part.startswith(_NOT_PROSE) else _fill(part) for part in parts if part)


def _fill(paragraph: str) -> str:
    return "\n".join(
        textwrap.fill(
            " ".join(item.split()),
            WIDTH,
            subsequent_indent="  " if item.startswith("- ") else "",
            break_long_words=False,
            break_on_hyphens=False,
        )
        for item in re.split(r"\n(?=- )", paragraph)
    )


def anchor(title: str) -> str:
    """The fragment of a link to the heading ``title``."""
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")


def with_block(text: str, name: str, block: str) -> str:
    """``text`` with ``block`` between the markers of ``name``. Without markers: before the second heading."""
    marked = f"<!-- {name}:start -->\n{block}\n<!-- {name}:end -->"
    pattern = re.compile(rf"<!-- {name}:start -->.*?<!-- {name}:end -->", re.DOTALL)
    if pattern.search(text):
        return pattern.sub(lambda _: marked, text)
    head, heading, rest = text.partition("\n## ")
    return f"{head.rstrip()}\n\n{marked}\n{heading}{rest}"
