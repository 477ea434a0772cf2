"""benchmarks.faults.soak: a few seconds of it lose and leak nothing."""

from __future__ import annotations

import asyncio
import json
import random
from typing import ClassVar

import pytest

from benchmarks.faults import soak
from benchmarks.faults.client import Reply
from benchmarks.faults.soak_gateway import BATCH_WAITING, SLOTS


async def test_short_soak_loses_and_leaks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak, "FAULT_EVERY_S", (0.3, 1.0))
    monkeypatch.setattr(soak, "FIRST_USES", 40)
    row = await soak.measure("simulated", minutes=0.15, seed=1, warm_up_min=0.0, calibrate_s=2.0)
    # In a few seconds the memory only fills.
    assert [problem for problem in row["problems"] if "memory" not in problem] == []
    assert row["seen"]["200"] > 20
    assert row["clients"] == SLOTS + BATCH_WAITING["simulated"]
    assert row["offered_per_s"] == pytest.approx(2 * row["saturation_per_s"], abs=0.02)
    assert row["ledger"]["open"] == 0
    assert row["unanswered"] == []
    assert 0 < row["longest_s"] < soak.ANSWER_S
    assert sum(row["faults"].values()) >= 2


async def test_saturation_is_measured_with_every_slot_and_the_queue_full(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scripted engine with two slots and a queue of three: a client that finds both full is turned down."""
    open_now, most, turned_down = 0, 0, 0

    class ScriptedRig:
        port = 1
        model = "simulated"
        slots = 2
        config: ClassVar = {"classes": {"batch": {"max_waiting": 3}}}

    room = asyncio.Semaphore(2)

    async def scripted(*parts: object, **options: object) -> Reply:
        nonlocal open_now, most, turned_down
        if open_now == 4:
            turned_down += 1
            return Reply(429, b"", "429 queue_full")
        open_now += 1
        most = max(most, open_now)
        async with room:
            await asyncio.sleep(0.02)
        open_now -= 1
        return Reply(200, b"", "200")

    monkeypatch.setattr(soak, "exchange", scripted)
    measured = await soak.Soak(ScriptedRig(), random.Random(0)).saturation(1.5)  # type: ignore[arg-type]
    assert (most, turned_down > 0) == (4, True)
    assert 10 < measured < 2 / 0.02 * 1.1, "two slots, 20 ms each"


async def test_request_without_an_answer_is_explained_by_its_record(monkeypatch: pytest.MonkeyPatch) -> None:
    record = {
        "slo_class": "batch", "slo": {"kind": "best_effort"}, "output": {"tokens": 6}, "outcome": "cancelled",
        "state": "ended", "attempts": [{"admitted_ms": 219_401.8}],
    }  # fmt: skip
    answers = [Reply(200, json.dumps(found).encode(), "200") for found in (record, {**record, "attempts": []})]

    class ScriptedRig:
        port = 1
        model = "simulated"
        config: ClassVar = {"classes": {"batch": {}}}

        async def get(self, path: str) -> Reply:
            assert path in ("/v1/requests/soak-1", "/v1/requests/soak-2")
            return answers.pop(0)

    async def no_answer(*parts: object, **options: object) -> Reply:
        return Reply()

    monkeypatch.setattr(soak, "exchange", no_answer)
    monkeypatch.setattr(soak, "DISCONNECTS", 0.0)
    running = soak.Soak(ScriptedRig(), random.Random(0))  # type: ignore[arg-type]
    await running.ask()
    await running.ask()
    assert running.unanswered == [
        "batch, best_effort, admitted after 219 s, 6 tokens, 1 attempts, cancelled",
        "batch, best_effort, waited, 0 attempts, cancelled",
    ]
    assert (running.ends.lost, running.longest_s) == (2, 0.0)


def test_soak_with_a_problem_is_told_what_is_wrong() -> None:
    ledger = {"accepted": 5, "open": 0, "finished": 3, "rejected": 1, "failed": 0, "cancelled": 0}
    row = {
        "lost": 1, "leaked_requests": 0, "leaked_descriptors": 0, "tracebacks": 0, "engine_hangs": 0,
        "unanswered": ["batch, best_effort, waited, 1 attempts, cancelled"],
        "seen": {"200": 3, "429 queue_full": 1, "500": 1}, "ledger": ledger, "slope_mb_per_min": 1.5,
        "predictor_up": False,
    }  # fmt: skip
    assert soak.problems(row) == [
        "lost: 1",
        "no answer: batch, best_effort, waited, 1 attempts, cancelled",
        "1 x 500",
        f"the ledger does not balance: {ledger}",
        "memory grows by 1.5 MB a minute, above 1",
        "the predictor is not back after 60 s",
    ]
