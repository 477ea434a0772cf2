"""What policies learn from reported steps."""

from __future__ import annotations

import pytest

from engine_adapter.engine import EngineState
from engine_adapter.step_report import Acceptance, StepReport


def test_acceptance_follows_the_latest_steps() -> None:
    acceptance = Acceptance()
    assert acceptance.accepted == 0
    for accepted in [4] * 50 + [12] * 1000:
        acceptance.observe(
            StepReport(10, 0, 100.0, 0.02, drafting_requests=4, draft_tokens=12, accepted_tokens=accepted)
        )
        acceptance.observe(StepReport(10, 0, 100.0, 0.02))
    assert acceptance.accepted == pytest.approx(3, abs=0.05)


@pytest.mark.parametrize("rate", [0.1, 0.4, 0.6, 0.8, 0.95])
@pytest.mark.parametrize("drafts", [1, 3, 5])
def test_acceptance_rate_is_that_of_each_draft(rate: float, drafts: int) -> None:
    acceptance, mean = Acceptance(), sum(rate**n for n in range(1, drafts + 1))
    for _ in range(100):
        acceptance.observe(StepReport(1000, 0, 100.0, 0.02, 1000, 1000 * drafts, round(1000 * mean)))
    assert acceptance.rate == pytest.approx(rate, abs=0.01)
    assert acceptance.expected(2) == pytest.approx(rate + rate**2, abs=0.02)
    assert acceptance.expected(0) == 0


@pytest.mark.parametrize("accepted", [0, 3])
def test_acceptance_of_none_or_all_drafts_stays_finite(accepted: int) -> None:
    acceptance = Acceptance()
    for _ in range(2000):
        acceptance.observe(StepReport(1, 0, 100.0, 0.02, 1, 3, accepted))
    assert 0 < acceptance.rate < 1


def test_policies_plan_with_the_tokens_of_a_step() -> None:
    state = EngineState()
    assert state.tokens_per_step == 1
    for _ in range(300):
        state.observe_step(StepReport(10, 0, 100.0, 0.05, 4, 12, 6, offered_requests=10))
    assert state.tokens_per_step == pytest.approx(2.5), "the gate dropped the drafts of six"
    assert state.step_time.curve.step_s(10, 1000) == pytest.approx(0.05, rel=0.02)


def test_few_requests_with_drafts_make_steps_bring_few_tokens() -> None:
    state = EngineState()
    for _ in range(2000):
        state.observe_step(StepReport(10, 0, 100.0, 0.05, 1, 3, 3, offered_requests=1))
    assert state.tokens_per_step == pytest.approx(1.3)
    for _ in range(2000):
        state.observe_step(StepReport(10, 0, 100.0, 0.05))
    assert state.tokens_per_step == pytest.approx(1.0, abs=0.01), "no text has drafts any more"
