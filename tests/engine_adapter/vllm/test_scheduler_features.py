"""vLLM's own scheduler with the step gate, where prompts are not split over steps (chunked prefill off)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from engine_adapter.gates import composite
from engine_adapter.gates.slack import SlackGate
from engine_adapter.step_time.linear_forms import StepTimes
from engine_adapter.step_time.model import StepTimeModel
from engine_adapter.vllm.gate_channel import GateReporter

if TYPE_CHECKING:
    from tests.fixtures.vllm_stepping import SteppedScheduler

# vLLM is imported, which takes seconds; no engine is started.
pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

TIMES = StepTimes(a=0.0, b=1e-3, c=0.0, d=0.01, alpha=2e-4, beta=0.0)
"""A step takes 10 ms, 1 ms per decode and 0.2 ms per prompt token."""


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., SteppedScheduler]:
    pytest.importorskip("vllm")
    from engine_adapter.vllm import scheduler as vllm_scheduler
    from tests.fixtures.vllm_stepping import SteppedScheduler, write_model_config

    clock: Any = SimpleNamespace(now=1000.0)
    clock.monotonic = clock.perf_counter = lambda: clock.now
    reporter = GateReporter(None)
    monkeypatch.setitem(composite.GATES, "slack", lambda: SlackGate(StepTimeModel(times=TIMES, learn=False)))
    monkeypatch.setattr(vllm_scheduler, "time", clock)
    monkeypatch.setattr(GateReporter, "from_env", lambda: reporter)
    return lambda **limits: SteppedScheduler(write_model_config(tmp_path / "model"), clock, reporter, **limits)


@pytest.mark.parametrize("chunked", [True, False])
def test_prompt_larger_than_the_slack_is_computed(make: Callable[..., SteppedScheduler], chunked: bool) -> None:
    """Its 1,000 tokens take 200 ms, and a pace of 31 ms at steps of `STEP_S` never leaves that much."""
    engine = make(seqs=4, blocks=1000, budget=4096, chunked=chunked)
    engine.add("paced", 10, 400, tpot_ms=31)
    for _ in range(5):
        engine.step()
    engine.add("long", 1000, 5, tpot_ms=31)
    chunks = [engine.step().get("long", 0) for _ in range(100)]
    prompt = [tokens for tokens in chunks if tokens > 1]
    if chunked:
        assert len(prompt) > 5
        assert sum(prompt) == 1000
    else:
        assert prompt == [1000]
    engine.drain()
    assert engine.generated == {"paced": 400, "long": 5}


def test_scheduler_of_a_server_refuses_pipeline_parallel(make: Callable[..., SteppedScheduler]) -> None:
    with pytest.raises(SystemExit, match=r"^Antares: pipeline-parallel-size is not supported: with the step gate"):
        make(seqs=4, blocks=100, pipeline=2)
