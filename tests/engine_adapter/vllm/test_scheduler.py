"""vLLM's own scheduler with the step gate: real requests and KV memory, without a model or an engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.fixtures.vllm_stepping import SteppedScheduler

# vLLM is imported, which takes seconds and much memory; no engine is started.
pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

Make = Callable[..., "SteppedScheduler"]

BLOCK_TOKENS = 16
"""As in `SteppedScheduler`."""


# --- best-effort preemption -------------------------------------------------------------------------------------------


def full_of_best_effort(make: Make, waiting: int = 0, **xargs: Any) -> SteppedScheduler:
    """An engine whose 8 slots are taken by best-effort requests "b0", "b1", ...; ``waiting`` more are queued."""
    engine = make(seqs=8, blocks=1000)
    for number in range(8 + waiting):
        engine.add(f"b{number}", 20, 200, **xargs)
    for _ in range(4):
        engine.step()
    return engine


def test_paced_request_overtakes_all_waiting_best_effort_requests(make: Make) -> None:
    engine = full_of_best_effort(make, waiting=40)
    engine.add("paced", 20, 5, tpot_ms=50)
    for _ in range(3):
        engine.step()
    assert engine.generated["paced"] == 2, "prefilled in the first of three steps; the last one is in flight"
    assert engine.best_effort_preemptions == 1
    engine.drain()
    assert all(engine.generated[f"b{number}"] == 200 for number in range(48))


@pytest.mark.parametrize(
    ("xargs", "preemptions"),
    [
        ({"tpot_ms": 50}, 1),
        ({"tpot_ms": 3_600_000}, 1),
        ({"kind": "deadline_only"}, 1),
        ({"kind": "best_effort", "tpot_ms": 50}, 0),
        ({"kind": "unknown", "tpot_ms": 50}, 1),
        ({"kind": ["best_effort"], "tpot_ms": 50}, 1),
        ({"kind": "unknown"}, 0),
        ({}, 0),
        ({"gate": "open"}, 0),
        ({"tpot_ms": -1}, 0),
        ({"tpot_ms": float("inf")}, 0),
        ({"tpot_ms": "50"}, 0),
    ],
)
def test_kind_decides_whether_an_arrival_preempts(make: Make, xargs: dict[str, Any], preemptions: int) -> None:
    engine = full_of_best_effort(make)
    engine.add("arrival", 20, 5, **xargs)
    for _ in range(3):
        engine.step()
    assert engine.best_effort_preemptions == preemptions


@pytest.mark.parametrize(
    ("xargs", "preemptions"),
    [
        ({"kind": "best_effort", "tpot_ms": 50}, 1),
        ({"kind": "yielding", "tpot_ms": 50}, 1),
        ({"kind": "deadline_only"}, 0),
        ({"tpot_ms": 3_600_000}, 0),
        ({"gate": "credit"}, 0),
    ],
)
def test_kind_decides_whether_a_request_is_preempted(make: Make, xargs: dict[str, Any], preemptions: int) -> None:
    engine = full_of_best_effort(make, **xargs)
    engine.add("paced", 20, 5, tpot_ms=50)
    for _ in range(3):
        engine.step()
    assert engine.best_effort_preemptions == preemptions


def test_kinds_without_pace_sit_out_a_full_step(make: Make) -> None:
    engine = make(seqs=8, blocks=1000, overlap=False)
    for name, xargs in {
        "paced": {"tpot_ms": 20},
        "loose": {"tpot_ms": 2000},
        "deadline-only": {"kind": "deadline_only"},
        "waived": {"kind": "best_effort", "tpot_ms": 20},
        "best-effort": {},
    }.items():
        engine.add(name, 4, 50, **xargs)
    engine.step()
    # Decodes take 15 of 20 ms; this prompt takes 20 ms.
    engine.add("prompt", 100, 5)
    scheduled = engine.step()
    assert {"paced", "loose"} == scheduled.keys() - {"prompt"}


def test_yielding_prompts_wait_for_prompts_of_others(make: Make) -> None:
    engine = make(seqs=8, blocks=1000, budget=100, overlap=False)
    engine.add("paced", 4, 50, tpot_ms=30)
    engine.add("yielding", 4, 50, tpot_ms=30, kind="yielding")
    engine.add("yielding prompt", 300, 5, tpot_ms=50, kind="yielding")
    assert "yielding prompt" not in engine.step()
    assert "yielding prompt" in engine.step()
    # Decodes take 12 ms and this prompt 20 ms. The next token of the paced request is due in 30 ms.
    engine.add("prompt", 100, 5, tpot_ms=50)
    assert engine.step().keys() == {"paced", "yielding", "prompt"}
    engine.drain()
    assert engine.generated["yielding prompt"] == 5


def test_recomputation_is_limited_to_the_slack_of_paced_requests(make: Make) -> None:
    engine = make(seqs=3, blocks=1000, overlap=False)
    for number in range(3):
        engine.add(f"b{number}", 10, 300)
    for _ in range(150):
        engine.step()
    engine.add("long", 10, 1000, tpot_ms=30)
    engine.add("short", 10, 5, tpot_ms=30)
    steps = [engine.step() for _ in range(500)]
    assert engine.best_effort_preemptions == 2
    recomputed = [step["b1"] for step in steps if step.get("b1", 0) > 1]
    assert sum(recomputed) >= 155, "its prompt and its output"
    # Decodes take 12 of 30 ms; the rest has time for 90 tokens.
    assert max(recomputed) <= 90


def test_memory_that_was_short_is_not_returned_at_once(make: Make) -> None:
    preemptions = {}
    for gate in ("open", "slack"):
        engine = make(seqs=64, blocks=150, budget=2048)
        paced = engine.add("paced", 100, 300, tpot_ms=50, gate=gate)
        best_effort = [engine.add(f"b{number}", 60, 100, gate=gate) for number in range(30)]
        engine.drain()
        preemptions[gate] = sum(request.num_preemptions for request in best_effort)
        assert paced.num_preemptions == 0
        assert engine.best_effort_preemptions == (preemptions[gate] if gate == "slack" else 0)
    assert 0 < preemptions["slack"] <= 1.5 * preemptions["open"]


def test_report_says_whether_the_engine_preempts(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    assert make(seqs=4, blocks=100).reporter.report.preemptible
    monkeypatch.setattr("engine_adapter.vllm.scheduler.PREEMPTION_VERSIONS", ((0, 1), (0, 2)))
    old = make(seqs=1, blocks=100)
    assert not old.reporter.report.preemptible
    old.add("best-effort", 20, 30)
    old.step()
    old.add("paced", 20, 3, tpot_ms=50)
    old.drain()
    assert old.best_effort_preemptions == 0


# --- reports ----------------------------------------------------------------------------------------------------------


def test_report_counts_decodes_by_pace(make: Make) -> None:
    engine = make(seqs=8, blocks=1000, overlap=False)
    engine.add("strict", 4, 41, tpot_ms=30, gate="credit")
    engine.add("loose", 4, 40, tpot_ms=60, gate="credit")
    engine.add("unpaced", 4, 41, gate="credit")
    for _ in range(41):
        engine.step()
    report = engine.reporter.report
    assert report.eligible == {"30": 40, "60": 40, "none": 40}
    assert report.batched == {"30": 40, "60": 20, "none": 40}
    assert (report.steps, report.gated_steps) == (41, 20)


def test_report_bounds_the_number_of_pace_labels(make: Make) -> None:
    engine = make(seqs=100, blocks=1000, overlap=False)
    for number in range(60):
        engine.add(f"r{number}", 4, 3, tpot_ms=30 + number, gate="open")
    engine.drain()
    assert len(engine.reporter.report.eligible) <= 33
    assert engine.reporter.report.eligible["other"] > 0


def test_unknown_gate_in_the_environment_is_rejected(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANTARES_GATE", "nope")
    with pytest.raises(ValueError, match="ANTARES_GATE: 'nope' is not a step gate"):
        make(seqs=4, blocks=100)


def test_backlog_leaves_out_what_the_prefix_cache_holds(make: Make) -> None:
    stepped = make(seqs=4, blocks=64, caching=True)
    stepped.add("first", 200, 1)
    assert stepped.scheduler._prefill_backlog(10_000) == 200
    assert stepped.scheduler._prefill_backlog(150) == 150
    stepped.drain()
    stepped.add("same beginning", 230, 1)
    assert stepped.scheduler._prefill_backlog(10_000) == 230 - 200 // BLOCK_TOKENS * BLOCK_TOKENS
    assert stepped.step()["same beginning"] == 230 - 200 // BLOCK_TOKENS * BLOCK_TOKENS


def test_backlog_without_a_prefix_cache_is_all_waiting_tokens(make: Make) -> None:
    stepped = make(seqs=4, blocks=64)
    stepped.add("first", 200, 1)
    stepped.drain()
    stepped.add("same beginning", 230, 1)
    assert stepped.scheduler._prefill_backlog(10_000) == 230
