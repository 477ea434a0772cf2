"""benchmarks.faults.soak: a few seconds of it lose and leak nothing."""

from __future__ import annotations

import pytest

from benchmarks.faults import soak


async def test_short_soak_loses_and_leaks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak, "FAULT_EVERY_S", (0.3, 1.0))
    row = await soak.measure("simulated", minutes=0.15, seed=1, calibrate_s=2.0)
    assert (row["lost"], row["leaked_requests"], row["leaked_descriptors"], row["tracebacks"]) == (0, 0, 0, 0)
    assert row["seen"]["200"] > 20
    assert row["ledger"]["open"] == 0
    assert sum(row["faults"].values()) >= 2
