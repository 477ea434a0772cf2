"""benchmarks.faults.soak: a few seconds of it lose and leak nothing."""

from __future__ import annotations

import pytest

from benchmarks.faults import soak


async def test_short_soak_loses_and_leaks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak, "FAULT_EVERY_S", (0.3, 1.0))
    row = await soak.measure("simulated", minutes=0.15, seed=1, warm_up_min=0.0, calibrate_s=2.0)
    # In a few seconds the memory only fills.
    assert [problem for problem in row["problems"] if "memory" not in problem] == []
    assert row["seen"]["200"] > 20
    assert row["ledger"]["open"] == 0
    assert sum(row["faults"].values()) >= 2


def test_soak_with_a_problem_is_told_what_is_wrong() -> None:
    ledger = {"accepted": 5, "open": 0, "finished": 3, "rejected": 1, "failed": 0, "cancelled": 0}
    row = {
        "lost": 1, "leaked_requests": 0, "leaked_descriptors": 0, "tracebacks": 0, "engine_hangs": 0,
        "seen": {"200": 3, "429 queue_full": 1, "500": 1}, "ledger": ledger, "slope_mb_per_min": 1.5,
        "predictor_up": False,
    }  # fmt: skip
    assert soak.problems(row) == [
        "lost: 1",
        "1 x 500",
        f"the ledger does not balance: {ledger}",
        "memory grows by 1.5 MB a minute, above 1",
        "the predictor is not back after 60 s",
    ]
