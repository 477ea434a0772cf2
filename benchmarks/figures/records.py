"""Reading run records: which of them, means over seeds, and how policies compare."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

Record = dict[str, Any]


def of(records: Sequence[Record], **wanted: Any) -> list[Record]:
    """The records with these members."""
    return [record for record in records if all(record.get(key) == value for key, value in wanted.items())]


def mean(records: Sequence[Record], key: str) -> float:
    """Mean of ``key`` over ``records``. Raises LookupError when there are none."""
    if not records:
        raise LookupError(f"no records that have {key!r}")
    return fmean(record[key] for record in records)


def policies(records: Sequence[Record]) -> list[str]:
    """Policies in the order of their first record."""
    return list(dict.fromkeys(record["policy"] for record in records))


def rates(records: Sequence[Record]) -> list[float]:
    """Offered rates, rising."""
    return sorted({record["qps"] for record in records})


def ratio(ours: float, theirs: float) -> float:
    """How many times ``theirs`` is ``ours``; infinite over nothing."""
    return ours / theirs if theirs else float("inf")


def compared(records: Sequence[Record], ours: str, theirs: str) -> tuple[float, float]:
    """Goodput of one policy over another's, and how many points of adherence lie between them (means over seeds)."""
    mine, others = of(records, policy=ours), of(records, policy=theirs)
    points = 100 * (mean(mine, "slo_adherence") - mean(others, "slo_adherence"))
    return ratio(mean(mine, "goodput"), mean(others, "goodput")), points


def times(value: float) -> str:
    """A factor in words: 3.46x, 12.1x."""
    if value == float("inf"):
        return "from nothing"
    return f"{value:.3g}x" if value < 100 else f"{value:.0f}x"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def name_of(policy: str) -> str:
    """A policy as tables call it."""
    return "`fcfs` (stock vLLM)" if policy == "fcfs" else f"`{policy}`"
