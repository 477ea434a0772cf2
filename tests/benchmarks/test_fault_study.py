"""benchmarks.faults.study: it measures a fault, and its page states what was measured."""

from __future__ import annotations

import asyncio

import pytest

from benchmarks.faults import study


def test_study_measures_one_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "RETURN_LIMIT_S", 0.1)
    row = asyncio.run(study.measure("503", requests=30, clients=4, seed=0))
    assert (row["succeeded"], row["ends"]) == (30, {"200": 30})
    assert row["rests"] >= 1
    assert 0 < row["asked_a"] < 30
    text = study.page({"made_with": {"clients": 4, "seed": 0}, "faults": [row]})
    assert "| `503` | 30 of 30 | none |" in text
