"""Drafts in a step's token budget."""

from __future__ import annotations

import pytest

from engine_adapter.gates.base import StepPlan
from engine_adapter.gates.drafts import fit_drafts
from tests.fixtures.decoding import DecodingRequest, best_effort


def decoding(*paces: float | None, drafts: int = 3) -> list[DecodingRequest]:
    return [DecodingRequest(str(number), pace, drafts=drafts) for number, pace in enumerate(paces)]


@pytest.mark.parametrize(
    ("plan", "tokens"),
    [(StepPlan(), 12), (StepPlan({"1"}), 8), (StepPlan(drop_drafts={"0"}), 9), (StepPlan({"0"}, {"0"}), 8)],
)
def test_tokens_of_decodes_count_drafts(plan: StepPlan, tokens: int) -> None:
    before = set(plan.drop_drafts)
    assert fit_drafts(decoding(0.03, 0.05, 0.5), plan, 12) == tokens
    assert plan.drop_drafts == before


@pytest.mark.parametrize(
    ("budget", "dropped"), [(16, set()), (15, {"3"}), (13, {"3"}), (12, {"3", "1"}), (4, {*"0123"})]
)
def test_loosest_drafts_are_dropped_first(budget: int, dropped: set[str]) -> None:
    requests, plan = [*decoding(0.05, 0.5, 0.03), best_effort("3")], StepPlan()
    requests[3].drafts = 3
    assert fit_drafts(requests, plan, budget) <= budget
    assert plan.drop_drafts == dropped


def test_step_without_paced_requests_stays_vllms_own() -> None:
    plan = StepPlan()
    assert fit_drafts(decoding(None, None), plan, 4) == 8
    assert plan == StepPlan()
