"""Selects and compares run records: filters, means over seeds, and ratios."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

Record = dict[str, Any]


def matching(records: Sequence[Record], **members: Any) -> list[Record]:
    """The records that have all of ``members``."""
    return [record for record in records if all(record.get(key) == value for key, value in members.items())]


def mean(records: Sequence[Record], key: str) -> float:
    """Mean of ``key`` over ``records``. Raises LookupError if there are none."""
    if not records:
        raise LookupError(f"records with {key!r}")
    return fmean(record[key] for record in records)


def policies_of(records: Sequence[Record]) -> list[str]:
    """Policies in the order of their first record."""
    return list(dict.fromkeys(record["policy"] for record in records))


def rates_of(records: Sequence[Record]) -> list[float]:
    """Offered rates in requests/s, ascending."""
    return sorted({record["qps"] for record in records})


def ratio(numerator: float, denominator: float) -> float:
    """``numerator / denominator``; infinite if the denominator is 0."""
    return numerator / denominator if denominator else float("inf")


def compare(records: Sequence[Record], policy: str, baseline: str) -> tuple[float, float]:
    """Goodput ratio of ``policy`` to ``baseline``, and their difference in adherence (points); means over seeds."""
    mine, others = matching(records, policy=policy), matching(records, policy=baseline)
    points = 100 * (mean(mine, "slo_adherence") - mean(others, "slo_adherence"))
    return ratio(mean(mine, "goodput"), mean(others, "goodput")), points


def factor_text(factor: float) -> str:
    """A ratio as text: 3.46x, 12.1x."""
    if factor == float("inf"):
        return "from 0"
    return f"{factor:.3g}x" if factor < 100 else f"{factor:.0f}x"
