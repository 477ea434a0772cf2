"""Best-effort requests beside paced ones, in the simulator."""

from __future__ import annotations

import math

import pytest

from engine_adapter.step_time.profile import load_profile
from gateway.policies.registry import make_policy
from lab.simulate.predictions import predict
from lab.simulate.simulator import simulate
from lab.workload import WorkloadRequest, make_workload


@pytest.mark.parametrize(("prompt_tokens", "qps"), [(2000, 10.0), (3500, 4.0)])
def test_long_best_effort_prompts_leave_paced_requests_their_prefill(prompt_tokens: int, qps: float) -> None:
    paced = make_workload("sharegpt", qps=12.0, duration_s=15.0, seed=3)
    documents = [
        WorkloadRequest(n / qps, prompt_tokens, 4, math.inf, math.inf, category=0) for n in range(int(15 * qps))
    ]
    workload = sorted([*paced, *documents], key=lambda request: request.at_s)
    result = simulate(
        workload,
        predict("oracle", workload, 0),
        load_profile("a100-llama3.1-8b"),
        lambda: make_policy("slack"),
    )
    attained = [one.attained for one in result.results if one.request.category]
    assert sum(attained) >= 0.9 * len(attained)
    assert all(one.outcome == "finished" for one in result.results if not one.request.category)
