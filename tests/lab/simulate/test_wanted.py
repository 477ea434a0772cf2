"""How many engines recent traffic needs."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from typing import Any

import pytest

from engine_adapter.step_time.profile import load_profile, profile_document
from lab.simulate import wanted
from lab.simulate.experiment import Experiment
from lab.simulate.replica_search import fewest_replicas
from lab.simulate.wanted import Traffic, wanted_replicas
from lab.workload import WorkloadRequest, make_workload

PROFILE = load_profile("a100-llama3.1-8b")


def _document(workload: list[WorkloadRequest], **settings: Any) -> dict[str, Any]:
    def bound(seconds: float) -> float | None:
        return None if math.isinf(seconds) else seconds

    rows = [
        [
            *(r.at_s, r.prompt_tokens, r.output_tokens),
            *map(bound, (r.ttft_slo_s, r.tpot_slo_s, r.e2e_slo_s)),
            *(r.output_tokens, r.output_tokens, r.best_effort),
        ]
        for r in workload
    ]
    return {"requests": rows, "profiles": [profile_document(PROFILE)], **settings}


def test_wanted_replicas_are_what_the_search_of_the_simulator_finds() -> None:
    experiment = Experiment(workload={"name": "azure-conv", "duration_s": 12.0, "max_prompt": 7000}, predictor="oracle")
    searched = fewest_replicas(experiment, "slack", 14.0, [0], 0.99)
    document = _document(experiment.requests(14.0, 0))

    answer = wanted_replicas(Traffic.of(json.loads(json.dumps(document))))

    assert answer.wanted == searched.replicas
    assert answer.sampled == 1.0
    assert answer.held
    assert not answer.saturated


def test_sample_of_a_large_fleet_finds_nearly_as_many(monkeypatch: pytest.MonkeyPatch) -> None:
    workload = make_workload("azure-conv", qps=25, duration_s=12, max_prompt=7000)
    traffic = Traffic.of(_document(workload))
    whole = wanted_replicas(traffic).wanted
    monkeypatch.setattr(wanted, "MAX_SIMULATED", len(workload) // 3)

    answer = wanted_replicas(traffic)

    assert answer.sampled == pytest.approx(1 / 3, abs=0.01)
    assert abs(answer.wanted - whole) <= 2


def test_no_traffic_wants_one_replica() -> None:
    assert wanted_replicas(Traffic.of(_document([]))).wanted == 1


def test_requests_that_no_engine_can_attain_want_no_more_replicas() -> None:
    workload = make_workload("sharegpt", qps=5, requests=60)
    hopeless = [WorkloadRequest(r.at_s, 4000, 10, 0.001, math.inf, 1) for r in workload[:30]]

    answer = wanted_replicas(Traffic.of(_document(sorted(workload + hopeless, key=lambda r: r.at_s))))

    assert (answer.wanted, answer.infeasible, answer.requests) == (1, 30, 60)


def test_engines_that_idle_are_enough_whatever_the_target() -> None:
    # Three prompts at once: two wait for the first, and a second engine would have to be idle for each of them.
    burst = [WorkloadRequest(60.0 * (n // 3), 2000, 2, 0.15, math.inf, 1) for n in range(30)]

    answer = wanted_replicas(Traffic.of(_document(burst, target=0.99, most=16)))

    assert answer.wanted < 16
    assert answer.held


def test_too_few_engines_answer_the_most_and_say_so() -> None:
    workload = make_workload("sharegpt", qps=120, duration_s=10)

    answer = wanted_replicas(Traffic.of(_document(workload, most=2, first=40)))

    assert (answer.wanted, answer.held) == (2, False)


def test_long_requests_are_cut_to_the_context_of_the_engine() -> None:
    long = [WorkloadRequest(0.0, 100_000, 100_000, math.inf, math.inf, 1)]

    assert wanted_replicas(Traffic.of(_document(long))).wanted == 1


def test_process_answers_on_stdout() -> None:
    workload = make_workload("sharegpt", qps=5, requests=20)

    run = subprocess.run(
        [sys.executable, "-m", "lab.simulate.wanted"],
        input=json.dumps(_document(workload)), capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip

    assert json.loads(run.stdout)["wanted"] == 1
