"""vLLM's scheduler with our step gate, vLLM's own requests and KV memory; what a model would say is made up here."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from benchmarks.live.dummy_model import write_dummy_model

if TYPE_CHECKING:
    from tests.fixtures.vllm_play import Engine

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

Make = Callable[..., "Engine"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dummy_model(tmp_path_factory.mktemp("scheduled") / "model")


@pytest.fixture
def make(model: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Makes an `Engine` with a clock of its own."""
    # Not at the top: whoever only collects tests should not wait for vLLM.
    from tests.fixtures.vllm_play import Engine

    from engine_adapter.vllm import scheduler as vllm_scheduler

    def made(**limits: int) -> Engine:
        clock: Any = SimpleNamespace(now=1000.0)
        clock.monotonic = clock.perf_counter = lambda: clock.now
        monkeypatch.setattr(vllm_scheduler, "time", clock)
        return Engine(model, clock, **limits)

    return made


@pytest.mark.parametrize("seed", range(24))
def test_no_token_is_lost_or_said_twice_and_all_memory_comes_back(make: Make, seed: int) -> None:
    whim = random.Random(seed)
    engine = make(seqs=whim.choice([2, 4, 8, 24]), blocks=whim.choice([30, 60, 200]), budget=whim.choice([32, 300]))
    asked = {}
    gone = set()
    for step in range(300):
        if step < 200 and whim.random() < 0.4:
            name, gate = f"r{step}", whim.choice(["slack", "slack", "slack", "credit", "open"])
            sizes = whim.randint(1, 150), whim.randint(1, 90)
            asked[name] = engine.add(name, *sizes, whim.choice([None, None, 50, 500]), gate)
        if whim.random() < 0.05 and engine.scheduler.requests:
            left = whim.choice(sorted(engine.scheduler.requests))
            engine.abort(left)
            gone.add(left)
        engine.step()
    engine.drain()
    for name, request in asked.items():
        if name not in gone:
            assert engine.said[name] == request.num_output_tokens == request.max_tokens


def test_who_has_a_pace_goes_before_all_that_wait_without_one(make: Make) -> None:
    engine = make(seqs=8, blocks=1000)
    for number in range(48):
        engine.add(f"o{number}", 20, 200)
    for _ in range(4):
        engine.step()
    engine.add("paced", 20, 5, tpot_ms=50)
    for _ in range(3):
        engine.step()
    assert engine.said["paced"] == 2, "prefilled in the first of three steps, and the last is not over"
    assert engine.best_effort_preemptions == 1
    engine.drain()
    assert all(engine.said[f"o{number}"] == 200 for number in range(48))


def test_memory_that_was_short_is_not_given_back_at_once(make: Make) -> None:
    preempted = {}
    for gate in ("open", "slack"):
        engine = make(seqs=64, blocks=150, budget=2048)
        paced = engine.add("paced", 100, 300, tpot_ms=50, gate=gate)
        others = [engine.add(f"o{number}", 60, 100, gate=gate) for number in range(30)]
        engine.drain()
        preempted[gate] = sum(request.num_preemptions for request in others)
        assert paced.num_preemptions == 0
        assert engine.best_effort_preemptions == (preempted[gate] if gate == "slack" else 0)
    assert 0 < preempted["slack"] <= 1.5 * preempted["open"]


def test_the_engine_says_whether_anybody_makes_way(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    assert make(seqs=4, blocks=100).scheduler._reporter.report.preemptible
    monkeypatch.setattr("engine_adapter.vllm.scheduler.MAKE_WAY_VERSIONS", ((0, 1), (0, 2)))
    old = make(seqs=1, blocks=100)
    assert not old.scheduler._reporter.report.preemptible
    old.add("other", 20, 30)
    old.step()
    old.add("paced", 20, 3, tpot_ms=50)
    old.drain()
    assert old.best_effort_preemptions == 0
