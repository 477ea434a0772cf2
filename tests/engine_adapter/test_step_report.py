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


def test_policies_see_the_part_of_a_step_that_brings_one_token() -> None:
    # Steps of 20 ms + 1 ms for each of 4 tokens of a decode, of which half are accepted, so a decode gets 2.5 tokens.
    state = EngineState()
    for number in range(600):
        decodes, prefill = number % 20 + 1, 100 * (number % 2)
        seconds = 0.02 + 1e-3 * 4 * decodes + 1e-4 * prefill
        state.observe_step(StepReport(decodes, prefill, 0.0, seconds, decodes, 3 * decodes, decodes + decodes // 2 * 1))
    tokens = 1 + state.acceptance.accepted
    assert tokens == pytest.approx(2.5, abs=0.05)
    curve = state.step_time.curve
    assert curve.step_s(10, 0) == pytest.approx(0.06 / tokens, rel=0.05)
    mixed_s = curve.step_s(10, 0, 100 / tokens)
    assert mixed_s == pytest.approx(0.07 / tokens, rel=0.1), "prompts keep their share of the time"
