"""Experiments: reproducible records, settings and errors, bounds on every run, and the search for capacity."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine_adapter.simulated.scheduler import STEP_MODES
from engine_adapter.step_time.profile import Profile, Regime, load_profile, save_profile
from gateway.policies.registry import POLICIES
from gateway.policies.s3 import S3
from gateway.policies.scorpio import Scorpio
from lab.simulate import experiment as module
from lab.simulate.experiment import Experiment, Run, capacity, parse_policy, perform, perform_all, runs_of

# Whole simulations are four times slower under a coverage tracer; unit tests cover the same code.
pytestmark = pytest.mark.no_cover

WALL_CLOCK = ("scheduling_s", "wall_s", "setup_s")
SMALL = Experiment(workload={"name": "small", "requests": 40, "max_output": 40})


def without_timings(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in WALL_CLOCK}


@pytest.fixture
def slow(tmp_path: Path) -> str:
    """A profile of an engine that a few requests per second overload."""
    path = tmp_path / "slow.json"
    regime = Regime(math.inf, 0.02, 0.0, 2e-4, 1e-3, 0.0, 0.0)
    save_profile(Profile("slow", "", {}, (regime,), 4, 512, 1024, 4096), path)
    return str(path)


# --- records ----------------------------------------------------------------------------------------------------------


def test_record_is_json_with_settings_of_the_run() -> None:
    record = perform(SMALL, Run("scorpio:eta=1.1", 40, 3))
    assert (record["policy"], record["qps"], record["seed"], record["requests"]) == ("scorpio:eta=1.1", 40, 3, 40)
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert 0 < record["utilisation"] <= 1
    assert record["steps"] > 0
    assert record["decisions"] >= 40
    assert record["duration_s"] > 0
    assert sum(group["requests"] for group in record["per_class"].values()) == 40


def test_record_is_reproducible_by_seed() -> None:
    one, again, other = (perform(SMALL, Run("scorpio", 60, seed)) for seed in (1, 1, 2))
    assert without_timings(one) == without_timings(again)
    assert without_timings(one) != without_timings(other)


def test_records_do_not_depend_on_number_of_processes() -> None:
    runs = runs_of(["scorpio", "mooncake"], [50.0], [0, 1])
    one_process, two_processes = (
        [without_timings(record) for record in perform_all(SMALL, runs, jobs)] for jobs in (1, 2)
    )
    assert one_process == two_processes


def test_runs_of_combines_policies_rates_and_seeds() -> None:
    runs = runs_of(["a", "b"], iter([1.0, None]), [7, 8])
    assert [(r.policy, r.qps, r.seed) for r in runs] == [
        (policy, qps, seed) for policy in "ab" for qps in (1.0, None) for seed in (7, 8)
    ]


def test_trace_without_rate_records_its_mean_rate() -> None:
    traced = Experiment(workload={"name": "small", "arrivals": "trace", "trace": "azure-conv", "requests": 50})
    record, last = perform(traced, Run("fcfs", None, 0)), traced.requests(None, 0)[-1]
    assert record["qps"] == pytest.approx(49 / last.at_s, abs=1e-3)


def test_limits_replace_those_of_the_profile() -> None:
    limited = replace(SMALL, limits={"max_num_seqs": 2, "kv_tokens": 9000})
    profile = load_profile(SMALL.profile)
    assert limited.engine() == replace(profile, max_num_seqs=2, kv_tokens=9000)
    assert SMALL.engine() == profile
    unlimited_run, limited_run = (perform(e, Run("fcfs", 60, 0)) for e in (SMALL, limited))
    assert limited_run["duration_s"] > unlimited_run["duration_s"]


def test_perform_passes_settings_to_simulate(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []
    simulate = module.simulate
    monkeypatch.setattr(
        module, "simulate", lambda *args, **options: calls.append(options) or simulate(*args, **options)
    )
    settings = {"learn": False, "replicas": 3, "step_mode": "prefill-first", "colocated_gateway": True}
    perform(replace(SMALL, **settings), Run("fcfs", 90, 0))
    (options,) = calls
    assert {name: options[name] for name in settings} == settings


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("mode", STEP_MODES)
def test_no_policy_exceeds_count_bound(policy: str, mode: str, slow: str) -> None:
    for profile, rates in (("a100-llama3.1-8b", (200, 2000)), (slow, (6, 40))):
        for replicas, qps in enumerate(rates, 1):
            record = perform(replace(SMALL, profile=profile, step_mode=mode, replicas=replicas), Run(policy, qps, 4))
            assert 0 <= record["slo_adherence"] <= record["count_bound"] <= 1
            assert record["fair_bound"] <= record["count_bound"]
            shares = record["finished"] + record["rejected"] + record["failed"]
            assert shares == pytest.approx(1, abs=2e-4)


def test_invalid_settings_raise(slow: str) -> None:
    for changes, run, error in (
        ({"profile": "b200"}, Run("fcfs", 5, 0), "no profile 'b200': choose one of a100-llama3.1-8b"),
        ({"predictor": "tarot"}, Run("fcfs", 5, 0), "unknown predictor 'tarot'"),
        ({"step_mode": "odd"}, Run("fcfs", 5, 0), "unknown step mode 'odd'"),
        ({"limits": {"kv_tokens": 500}}, Run("fcfs", 5, 0), r"kv_tokens \(500\) must hold"),
        ({"limits": {"max_num_seqs": 0}}, Run("fcfs", 5, 0), "max_num_seqs must be positive"),
        ({"workload": {"name": "small", "duration_s": 1e-6}}, Run("fcfs", 5, 0), "the workload has no requests"),
        ({"workload": {"name": "azure-conv", "requests": 2000}, "profile": slow}, Run("fcfs", 5, 0), "--max-prompt"),
        ({}, Run("best", 5, 0), "no policy is called 'best'"),
    ):
        with pytest.raises(ValueError, match=error):
            perform(replace(SMALL, **changes), run)


# --- policy strings ---------------------------------------------------------------------------------------------------


def test_parse_policy_reads_name_and_options() -> None:
    assert parse_policy("scorpio:eta=1.2,tpot_guard=False, slack_s = 0.1") == Scorpio(
        eta=1.2, tpot_guard=False, slack_s=0.1
    )
    assert parse_policy(" s3 : prefill_lookahead_steps=3 ") == S3(prefill_lookahead_steps=3)
    assert parse_policy("s3:") == S3()


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("best", "no policy is called 'best'; choose one of fcfs, s3, mooncake, scorpio"),
        ("", "no policy is called ''"),
        ("scorpio:etta=1", r"has no option 'etta'; did you mean 'eta'\?"),
        ("scorpio:eta", "NAME:OPTION=VALUE,...; 'eta' has no value"),
        ("scorpio:eta=nan", "eta must be a number of at least 0, but it is nan"),
        ("scorpio:eta=true", "eta must be a number"),
        ("scorpio:tpot_guard=1", "tpot_guard must be true or false"),
        ("ttft_guard_only:tpot_guard=true", "has no option 'tpot_guard'"),
    ],
)
def test_parse_policy_lists_accepted_values_on_error(text: str, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        parse_policy(text)


# --- capacity ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def fake_runs(monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    """The runs of a fake experiment whose capacity is the name of the policy."""
    performed: list[Run] = []

    def fake(experiment: Experiment, runs: Sequence[Run], jobs: int = 1) -> Iterator[dict[str, Any]]:
        performed.extend(runs)
        return iter([{"slo_adherence": 1.0 if run.qps <= float(run.policy) else 0.4} for run in runs])

    monkeypatch.setattr(module, "perform_all", fake)
    return performed


@pytest.mark.parametrize("true_qps", [0.26, 0.7, 1.0, 1.3, 8.0, 37.9, 4000.0])
def test_capacity_is_within_two_percent_below_true_rate(true_qps: float, fake_runs: list[Run]) -> None:
    rate, records = capacity(SMALL, str(true_qps), [0], 0.9)
    assert rate <= true_qps < rate * 1.021
    assert len(records) == len(fake_runs) < 25
    assert len({run.qps for run in fake_runs}) == len(fake_runs), "no rate is tried twice"


@pytest.mark.parametrize("first_qps", [20.0, 200.0, 2000.0])
def test_capacity_does_not_depend_on_the_first_rate(first_qps: float, fake_runs: list[Run]) -> None:
    rate, _ = capacity(SMALL, "200.5", [0], 0.9, first_qps=first_qps, growth=1.2)
    assert rate <= 200.5 < rate * 1.021
    assert len(fake_runs) < 25


@pytest.mark.usefixtures("fake_runs")
@pytest.mark.parametrize(("true_qps", "rate"), [(0.2, 0.0), (10_000.0, 4096.0)])
def test_capacity_has_lower_and_upper_limit(true_qps: float, rate: float) -> None:
    assert capacity(SMALL, str(true_qps), [0], 0.9)[0] == rate


def test_capacity_uses_mean_over_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(experiment: Experiment, runs: Sequence[Run], jobs: int = 1) -> Iterator[dict[str, Any]]:
        return iter([{"slo_adherence": 1.0 if run.qps <= (5 if run.seed else 20) else 0.0} for run in runs])

    monkeypatch.setattr(module, "perform_all", fake)
    tried: list[tuple[float, float]] = []
    either, _ = capacity(SMALL, "x", [0, 1], 0.5, on_try=lambda qps, measured: tried.append((qps, measured)))
    both, _ = capacity(SMALL, "x", [0, 1], 0.9)
    assert either <= 20 < either * 1.021
    assert both <= 5 < both * 1.021
    assert {measured for _, measured in tried} == {1.0, 0.5, 0.0}


def test_capacity_of_simulated_engine_doubles_with_second_replica(slow: str) -> None:
    experiment = Experiment(
        profile=slow, workload={"name": "small", "requests": 40, "max_output": 12}, predictor="oracle"
    )
    one, records = capacity(experiment, "fcfs", [0], 0.9, precision=0.1)
    two, _ = capacity(replace(experiment, replicas=2), "fcfs", [0], 0.9, precision=0.1)
    assert max(record["qps"] for record in records if record["slo_adherence"] >= 0.9) == pytest.approx(one, abs=1e-3)
    assert 1.6 * one < two < 3 * one


def test_capacity_counts_rate_without_requests_as_kept() -> None:
    brief = Experiment(workload={"name": "small", "duration_s": 0.05, "max_output": 4})
    assert not brief.requests(1.0, 0)
    rate, records = capacity(brief, "fcfs", [0], 0.9, precision=0.5)
    assert rate >= 1
    assert all(record["requests"] for record in records)
