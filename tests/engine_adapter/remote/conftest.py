"""A simulated engine that is a server's app."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from engine_adapter.engine import EngineEvents
from engine_adapter.simulated.engine import SimulatedEngine
from engine_adapter.step_time.linear_forms import StepTimes


@pytest.fixture
async def simulated() -> AsyncIterator[SimulatedEngine]:
    engine = SimulatedEngine(times=StepTimes(b=0, d=2e-3, alpha=1e-5), restart_s=0.3)
    await engine.start(EngineEvents())
    yield engine
    await engine.stop()
