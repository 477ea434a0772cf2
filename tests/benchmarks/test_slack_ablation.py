"""benchmarks.slack.ablation: without a component, `slack` behaves differently, and only then."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

import pytest

from benchmarks.slack.ablation import (
    BEST_EFFORT_PREEMPTION,
    E2E_PACE_FACTOR,
    FULL,
    MEMORY_CHECK,
    MIN_ADMISSION_SHARE,
    REMOVALS,
    without,
)
from engine_adapter.gates.composite import GATES
from engine_adapter.gates.constants import SLACK
from engine_adapter.step_time.curve import StepCurve
from engine_adapter.step_time.model import StepTimeModel
from engine_adapter.step_time.profile import load_profile
from gateway.policies.slack.policy import Slack
from lab.records.run_record import RequestResult
from lab.simulate.experiment import parse_policy
from lab.simulate.predictions import predict
from lab.simulate.replica import Replica
from lab.simulate.simulator import SimulationResult, simulate
from lab.workload import WorkloadRequest, make_workload
from tests.fixtures.policy_builders import admitted, decide, make_request

pytestmark = pytest.mark.no_cover  # whole simulations are slow under coverage

A100 = load_profile("a100-llama3.1-8b")
OVERLOAD = make_workload("sharegpt", qps=120.0, duration_s=4.0, seed=3)
NEEDS_OTHER_CONDITIONS = {FULL, MIN_ADMISSION_SHARE, MEMORY_CHECK, E2E_PACE_FACTOR, BEST_EFFORT_PREEMPTION}


def simulated(component: str, workload: Sequence[WorkloadRequest] = OVERLOAD, **limits: Any) -> SimulationResult:
    """The result of `slack` without ``component``."""
    with without(component):
        make = partial(parse_policy, "slack")
        return simulate(workload, predict("shipped", workload, 0), replace(A100, **limits), make)


@cache  # not a fixture, which would run under coverage
def complete() -> list[RequestResult]:
    return simulated(FULL).results


def test_without_nothing_is_slack() -> None:
    with without(FULL):
        assert parse_policy("slack") == Slack()
    assert complete() == simulate(OVERLOAD, predict("shipped", OVERLOAD, 0), A100, Slack).results


@pytest.mark.parametrize("component", [name for name in REMOVALS if name not in NEEDS_OTHER_CONDITIONS])
def test_without_component_changes_results_under_overload(component: str) -> None:
    results = simulated(component).results
    assert len(results) == len(OVERLOAD)
    assert results != complete()


@pytest.mark.parametrize("component", REMOVALS)
def test_without_restores_slack(component: str) -> None:
    constants, gate, refit = replace(SLACK), GATES["slack"], StepTimeModel.refit
    with pytest.raises(ZeroDivisionError), without(component):
        raise ZeroDivisionError
    assert parse_policy("slack") == Slack()
    assert (SLACK, GATES["slack"], StepTimeModel.refit) == (constants, gate, refit)


def test_without_min_admission_share_sets_option() -> None:
    with without(MIN_ADMISSION_SHARE):
        assert parse_policy("slack") == Slack(min_admission_share=0.0)


def test_without_memory_check_admits_more_than_fits() -> None:
    workload = make_workload("sharegpt", qps=60.0, duration_s=8.0, seed=1)
    full, no_check = (simulated(component, workload, kv_tokens=9000) for component in (FULL, MEMORY_CHECK))
    assert full.preemptions < no_check.preemptions


def test_without_e2e_pace_factor_attains_less() -> None:
    workload = make_workload("code-chat", qps=60.0, duration_s=8.0, seed=1)
    full, removed = (sum(r.attained for r in simulated(c, workload).results) for c in (FULL, E2E_PACE_FACTOR))
    assert removed < 0.95 * full


def test_without_late_rejection_finishes_all() -> None:
    assert {result.outcome for result in simulated("late rejection").results} == {"finished"}
    assert any(result.outcome == "rejected" for result in complete())


def test_without_skip_over_blocks_shorter_request() -> None:
    # The first two prompts do not fit in the prefill lookahead together; the third one does.
    waiting = [make_request("a", prompt=3500, ttft=1.0, tpot=0.03, at=0.0),
               make_request("b", prompt=1000, ttft=1.5, tpot=0.03, at=0.0),
               make_request("c", prompt=50, ttft=2.0, tpot=0.03, at=0.0)]  # fmt: skip
    found = {}
    for component in (FULL, "skip-over"):
        with without(component):
            state = Replica(A100, Slack()).state
            found[component] = admitted(decide(parse_policy("slack:cost_weight=0"), 0.0, waiting, [], state))
    assert found == {FULL: ["a", "c"], "skip-over": ["a"]}


def test_without_step_curve_learns_linear_forms_only() -> None:
    def learned() -> StepTimeModel:
        model = StepTimeModel(A100.step_times(), forms=False)
        for n in range(200):
            decodes, prefill = 1 + n % 60, 64 * (n % 7)
            model.observe(decodes, prefill, 300, A100.step_seconds(decodes, 300 * decodes, prefill, 0))
        return model

    with without("step curve"):
        model = learned()
    line = StepCurve.of(model.times)
    assert model.curve.at_knots == pytest.approx(line.at_knots)
    assert (model.curve.a, model.curve.e, model.curve.h) == (line.a, line.e, line.h)
    assert model.times != A100.step_times()
    curved = learned()
    assert curved.curve.at_knots != pytest.approx(StepCurve.of(curved.times).at_knots, rel=0.01)
