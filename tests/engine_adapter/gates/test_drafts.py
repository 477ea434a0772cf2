"""Drafts of a step: which requests keep them, and whether they fit in the token budget."""

from __future__ import annotations

import pytest

from engine_adapter.gates.base import StepPlan
from engine_adapter.gates.drafts import best_drafts, fit_drafts
from engine_adapter.gates.slack import SlackGate
from engine_adapter.step_report import Acceptance, StepReport
from engine_adapter.step_time.curve import StepCurve
from engine_adapter.step_time.linear_forms import StepTimes
from engine_adapter.step_time.model import StepTimeModel
from tests.fixtures.decoding import DecodingRequest, best_effort

TIMES = StepTimes(a=0.0, b=1e-4, c=0.0, d=0.01, alpha=1e-4, beta=0.0)
"""A step takes 10 ms, and 0.1 ms per token of any kind."""

CURVE = StepCurve.of(TIMES)


def decoding(*paces: float | None, drafts: int = 3) -> list[DecodingRequest]:
    return [DecodingRequest(str(number), pace, drafts=drafts) for number, pace in enumerate(paces)]


def learned(accepted: int = 120) -> Acceptance:
    """Acceptance of ``accepted`` of 300 drafts of 100 requests, 3 each."""
    acceptance = Acceptance()
    for _ in range(200):
        acceptance.observe(StepReport(100, 0, 100.0, 0.02, 100, 300, accepted))
    return acceptance


# --- in the budget ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plan", "tokens"),
    [
        (StepPlan(), 12),
        (StepPlan({"1"}), 8),
        (StepPlan(drafts={"0": 0}), 9),
        (StepPlan(drafts={"0": 1, "1": 2}), 9),
        (StepPlan({"0"}, {"0": 0}), 8),
    ],
)
def test_tokens_of_decodes_count_drafts(plan: StepPlan, tokens: int) -> None:
    before = dict(plan.drafts)
    assert fit_drafts(decoding(0.03, 0.05, 0.5), plan, 12) == tokens
    assert plan.drafts == before


@pytest.mark.parametrize(("budget", "dropped"), [(16, ""), (15, "3"), (13, "3"), (12, "31"), (4, "0123")])
def test_loosest_drafts_are_dropped_first(budget: int, dropped: str) -> None:
    requests, plan = [*decoding(0.05, 0.5, 0.03), best_effort("3")], StepPlan()
    requests[3].drafts = 3
    assert fit_drafts(requests, plan, budget) <= budget
    assert plan.drafts == dict.fromkeys(dropped, 0)


def test_step_without_paced_requests_stays_vllms_own() -> None:
    plan = StepPlan()
    assert fit_drafts(decoding(None, None), plan, 4) == 8
    assert plan == StepPlan()


# --- by expected tokens per second ------------------------------------------------------------------------------------


def kept(requests: list[DecodingRequest], acceptance: Acceptance, backlog: int = 0) -> list[int]:
    """Return the drafts that each request keeps."""
    limits = best_drafts(requests, acceptance, CURVE, backlog)
    return [limits.get(r.request_id, r.drafts) for r in requests]


def test_all_drafts_are_kept_until_acceptance_is_measured() -> None:
    assert kept(decoding(0.03, 0.5), Acceptance()) == [3, 3]


def test_small_batch_keeps_drafts_because_they_are_almost_free() -> None:
    assert kept(decoding(0.5, 0.5, None), learned()) == [3, 3, 3]


def test_requests_that_bound_the_step_keep_drafts_and_loose_ones_do_not() -> None:
    # 200 decodes take 30 ms, too long for paces of 25 ms; prompts wait.
    requests = decoding(*[0.025] * 50, *[0.5] * 150)
    drafts = kept(requests, learned(), backlog=2000)
    assert all(drafts[:50])
    assert not any(drafts[50:])


def test_strict_requests_keep_drafts_when_these_are_rarely_accepted_only_if_they_help() -> None:
    requests = decoding(*[0.05] * 200)
    assert sum(kept(requests, learned(accepted=3), backlog=2000)) <= 1, "one draft is left to measure acceptance"


def test_gate_gives_a_step_the_time_of_the_tokens_that_it_brings() -> None:
    gate = SlackGate(StepTimeModel(times=TIMES, learn=False))
    requests = decoding(0.03, 0.03)
    without = gate.plan(0.0, decoding(0.03, 0.03, drafts=0), 10_000).max_prefill_tokens
    gate.forget("0")
    gate.forget("1")
    for _ in range(200):
        gate.observe(StepReport(2, 0, 100.0, 0.02, 2, 6, 2))
    plan = gate.plan(0.0, requests, 10_000)
    assert without is not None
    assert plan.max_prefill_tokens is not None
    assert plan.max_prefill_tokens > 1.5 * without
    assert gate.plan(0.0, requests, 0).sit_out == set()
