"""The code-chat workload and end-to-end bounds: workload, simulator, bounds and run record."""

from __future__ import annotations

import math

import numpy as np
import pytest

from benchmarks.annealing.burst import burst
from benchmarks.annealing.on_slack import AnnealingOnSlack
from benchmarks.annealing.paper import serve, standing
from engine_adapter.step_time.profile import load_profile
from gateway.requests.request import Request
from gateway.requests.slo import Slo
from lab.bounds import bounds, token_costs
from lab.records.run_record import RequestResult, run_record
from lab.simulate.experiment import Experiment, Run, perform
from lab.simulate.predictions import predict
from lab.simulate.simulator import simulate, slo_of
from lab.workload import WorkloadRequest, make_workload

A100 = load_profile("a100-llama3.1-8b")

simulates = pytest.mark.no_cover
"""Whole simulations are four times slower under a coverage tracer; unit tests cover the same code."""


def test_code_has_e2e_bounds_and_chat_has_token_bounds() -> None:
    workload = make_workload("code-chat", qps=5.0, requests=4000, seed=3)
    code = [a for a in workload if a.e2e_slo_s < math.inf]
    chat = [a for a in workload if a.e2e_slo_s == math.inf]
    assert len(code) == pytest.approx(2000, abs=150)
    assert all(a.ttft_slo_s == a.tpot_slo_s == math.inf for a in code)
    assert all(max(a.ttft_slo_s, a.tpot_slo_s) < math.inf for a in chat)
    assert np.median([a.prompt_tokens for a in code]) == pytest.approx(25, abs=3)
    assert np.median([a.output_tokens for a in code]) == pytest.approx(280, rel=0.1)
    assert np.std(np.log([a.output_tokens for a in chat])) > np.std(np.log([a.output_tokens for a in code])) + 0.2
    assert workload == make_workload("code-chat", qps=5.0, requests=4000, seed=3)


def test_slo_of_drops_infinite_bounds() -> None:
    assert slo_of(WorkloadRequest(0.0, 1, 1, math.inf, math.inf, 3, 9.0)) == Slo(None, None, 9.0)
    assert slo_of(WorkloadRequest(0.0, 1, 1, 1.0, 0.05, 1)) == Slo(1.0, 0.05, None)


def test_e2e_bound_applies_to_last_token() -> None:
    request = WorkloadRequest(0.0, 10, 20, math.inf, math.inf, 3, 9.0)
    results = [RequestResult(request, "finished", 8.0, 0.5, e2e) for e2e in (8.9, 9.1)]
    record = run_record("fcfs", 1.0, 0, results, 10.0, wall_s=1.0)
    assert (record["slo_adherence"], record["e2e_violations"]) == (0.5, 0.5)
    assert (record["ttft_violations"], record["tpot_violations"]) == (0, 0)
    assert record["e2e_p50_s"] == pytest.approx(9.0)


def test_bounds_exclude_infeasible_e2e_bound() -> None:
    possible, infeasible = (
        WorkloadRequest(0.0, 10, 100, math.inf, math.inf, 3, 10.0),
        WorkloadRequest(0.0, 10, 100, math.inf, math.inf, 3, 0.1),
    )
    one_token = WorkloadRequest(0.0, 10, 1, 1.0, math.inf, 1)
    assert bounds([possible, infeasible, one_token], token_costs(A100))[0] == pytest.approx(2 / 3)


@simulates
@pytest.mark.parametrize("policy", ["fcfs", "s3", "mooncake", "scorpio", "slack", "annealing"])
def test_every_policy_serves_code_and_chat(policy: str) -> None:
    experiment = Experiment(workload={"name": "code-chat", "requests": 24})
    record = perform(experiment, Run(policy, 10.0, 0))
    assert record["slo_adherence"] >= 0.85
    assert record["slo_adherence"] <= record["count_bound"] + 1e-9
    assert set(record["per_class"]) == {"1", "2", "3", "4"}


def test_deadline_of_e2e_bound_is_earlier_for_longer_answers() -> None:
    def deadline(tokens: float) -> float:
        return Request("r", "code", 100.0, Slo(e2e_s=10.0), 50, tokens).deadline_s

    assert deadline(20) > deadline(200) > deadline(300) > 100.0
    assert deadline(1) <= 105.0
    assert deadline(5000) == pytest.approx(100.5)


@simulates
def test_standing_set_attains_more_with_more_instances() -> None:
    one, _ = serve("annealing", standing(16, 0, 0.5), 2, 1, "oracle", 0)
    four, _ = serve("annealing", standing(16, 0, 0.5), 2, 4, "oracle", 0)
    assert one < four <= 1.0


@simulates
def test_annealing_on_slack_ends_every_request() -> None:
    workload = make_workload("code-chat", qps=60.0, requests=60, seed=1)
    for mode in ("order", "set"):
        predictions = predict("shipped", workload, 1)
        result = simulate(workload, predictions, A100, lambda mode=mode: AnnealingOnSlack(mode))
        assert len(result.results) == 60


def test_burst_mixes_both_kinds_of_bounds() -> None:
    workload = burst(64, 0, 20.0)
    assert len(workload) == 64
    assert sum(a.e2e_slo_s < math.inf for a in workload) == 32
    assert all(a.at_s == 0.0 for a in workload)
