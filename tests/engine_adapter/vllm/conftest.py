"""Makes schedulers that tests step without a model."""

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

Make = Callable[..., "SteppedScheduler"]

TIMES = StepTimes(a=0.0, b=1e-3, c=0.0, d=0.01, alpha=2e-4, beta=0.0)
"""A step takes 10 ms, 1 ms per decode and 0.2 ms per prompt token."""


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("vllm")
    from tests.fixtures.vllm_stepping import write_model_config

    return write_model_config(tmp_path_factory.mktemp("scheduler"))


@pytest.fixture
def make(model: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Make schedulers, each with a clock and a reporter of its own. Their `slack` gate has fixed step times."""
    # Not at the top: importing vLLM takes seconds, also when tests are only collected.
    from engine_adapter.vllm import scheduler as vllm_scheduler
    from tests.fixtures.vllm_stepping import SteppedScheduler

    def fixed_slack_gate() -> SlackGate:
        return SlackGate(StepTimeModel(times=TIMES, learn=False))

    monkeypatch.setitem(composite.GATES, "slack", fixed_slack_gate)

    def make_scheduler(**limits: Any) -> SteppedScheduler:
        clock: Any = SimpleNamespace(now=1000.0)
        clock.monotonic = clock.perf_counter = lambda: clock.now
        reporter = GateReporter(None)
        monkeypatch.setattr(vllm_scheduler, "time", clock)
        monkeypatch.setattr(GateReporter, "from_env", lambda: reporter)
        return SteppedScheduler(model, clock, reporter, **limits)

    return make_scheduler
