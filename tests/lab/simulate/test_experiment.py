"""Runs of an experiment: the same settings give the same record, in any process; and no run passes the bounds."""

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

pytestmark = (
    pytest.mark.no_cover
)  # whole simulations, four times slower under a tracer; the rooms have tests of their own

WALL_CLOCK = ("scheduling_s", "wall_s", "setup_s")
SMALL = Experiment(workload={"name": "small", "requests": 40, "max_output": 40})


def timeless(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in WALL_CLOCK}


@pytest.fixture
def slow(tmp_path: Path) -> str:
    """A profile of an engine that a handful of requests a second overload."""
    path = tmp_path / "slow.json"
    regime = Regime(math.inf, 0.02, 0.0, 2e-4, 1e-3, 0.0, 0.0)
    save_profile(Profile("slow", "", {}, (regime,), 4, 512, 1024, 4096), path)
    return str(path)


# --- records ----------------------------------------------------------------------------------------------------------


def test_a_record_is_plain_json_with_the_runs_own_settings() -> None:
    record = perform(SMALL, Run("scorpio:eta=1.1", 40, 3))
    assert (record["policy"], record["qps"], record["seed"], record["requests"]) == ("scorpio:eta=1.1", 40, 3, 40)
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert 0 < record["utilisation"] <= 1
    assert record["steps"] > 0
    assert record["decisions"] >= 40
    assert record["duration_s"] > 0
    assert sum(group["requests"] for group in record["per_class"].values()) == 40


def test_the_same_run_gives_the_same_record_and_another_seed_another() -> None:
    one, again, other = (perform(SMALL, Run("scorpio", 60, seed)) for seed in (1, 1, 2))
    assert timeless(one) == timeless(again)
    assert timeless(one) != timeless(other)


def test_other_processes_give_the_same_records_in_the_same_order() -> None:
    runs = runs_of(["scorpio", "mooncake"], [50.0], [0, 1])
    here, there = (list(perform_all(SMALL, runs, jobs)) for jobs in (1, 2))
    assert [timeless(record) for record in here] == [timeless(record) for record in there]


def test_runs_are_every_policy_at_every_rate_with_every_seed() -> None:
    runs = runs_of(["a", "b"], iter([1.0, None]), [7, 8])
    assert [(r.policy, r.qps, r.seed) for r in runs] == [
        (policy, qps, seed) for policy in "ab" for qps in (1.0, None) for seed in (7, 8)
    ]


def test_a_trace_at_its_own_pace_is_recorded_with_the_rate_it_had() -> None:
    traced = Experiment(workload={"name": "small", "arrivals": "trace", "trace": "azure-conv", "requests": 50})
    record, last = perform(traced, Run("fcfs", None, 0)), traced.asked(None, 0)[-1]
    assert record["qps"] == pytest.approx(49 / last.at_s, abs=1e-3)


def test_limits_stand_in_for_the_profiles_own() -> None:
    limited = replace(SMALL, limits={"max_num_seqs": 2, "kv_tokens": 9000})
    profile = load_profile(SMALL.profile)
    assert limited.engine() == replace(profile, max_num_seqs=2, kv_tokens=9000)
    assert SMALL.engine() == profile
    free, held = (perform(e, Run("fcfs", 60, 0)) for e in (SMALL, limited))
    assert held["duration_s"] > free["duration_s"]


def test_the_settings_of_the_engines_reach_the_simulator(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, Any]] = []
    really = module.simulate
    monkeypatch.setattr(module, "simulate", lambda *args, **more: given.append(more) or really(*args, **more))
    perform(replace(SMALL, learn=False, replicas=3, step_mode="prefill-first"), Run("fcfs", 90, 0))
    (settings,) = given
    assert (settings["learn"], settings["replicas"], settings["step_mode"]) == (False, 3, "prefill-first")


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("mode", STEP_MODES)
def test_no_policy_passes_the_count_bound(policy: str, mode: str, slow: str) -> None:
    for profile, rates in (("a100-llama3.1-8b", (200, 2000)), (slow, (6, 40))):
        for replicas, qps in enumerate(rates, 1):
            record = perform(replace(SMALL, profile=profile, step_mode=mode, replicas=replicas), Run(policy, qps, 4))
            assert 0 <= record["slo_adherence"] <= record["count_bound"] <= 1
            assert record["fair_bound"] <= record["count_bound"]
            shares = record["finished"] + record["rejected"] + record["failed"]
            assert shares == pytest.approx(1, abs=2e-4)


def test_settings_that_cannot_be_are_refused(slow: str) -> None:
    for changes, run, says in (
        ({"profile": "b200"}, Run("fcfs", 5, 0), "no profile 'b200': choose one of a100-llama3.1-8b"),
        ({"predictor": "tarot"}, Run("fcfs", 5, 0), "no predictor is called 'tarot'"),
        ({"step_mode": "odd"}, Run("fcfs", 5, 0), "unknown step mode 'odd'"),
        ({"limits": {"kv_tokens": 500}}, Run("fcfs", 5, 0), r"kv_tokens \(500\) must hold"),
        ({"limits": {"max_num_seqs": 0}}, Run("fcfs", 5, 0), "max_num_seqs must be positive"),
        ({"workload": {"name": "small", "duration_s": 1e-6}}, Run("fcfs", 5, 0), "the workload has no requests"),
        ({"workload": {"name": "azure-conv", "requests": 2000}, "profile": slow}, Run("fcfs", 5, 0), "--max-prompt"),
        ({}, Run("best", 5, 0), "no policy is called 'best'"),
    ):
        with pytest.raises(ValueError, match=says):
            perform(replace(SMALL, **changes), run)


# --- policies by text -------------------------------------------------------------------------------------------------


def test_a_policy_is_a_name_with_options() -> None:
    assert parse_policy("scorpio:eta=1.2,tpot_guard=False, slack_s = 0.1") == Scorpio(
        eta=1.2, tpot_guard=False, slack_s=0.1
    )
    assert parse_policy(" s3 : prefill_lookahead_steps=3 ") == S3(prefill_lookahead_steps=3)
    assert parse_policy("s3:") == S3()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("best", "no policy is called 'best'; choose one of fcfs, s3, mooncake, scorpio"),
        ("", "no policy is called ''"),
        ("scorpio:etta=1", "has no option 'etta'; its options: eta"),
        ("scorpio:eta", "NAME:OPTION=VALUE,..., but 'eta' has no value"),
        ("scorpio:eta=nan", "eta must be a number of at least 0, but it is nan"),
        ("scorpio:eta=true", "eta must be a number"),
        ("scorpio:tpot_guard=1", "tpot_guard must be true or false"),
        ("ttft_guard_only:tpot_guard=true", "has no option 'tpot_guard'"),
    ],
)
def test_a_wrong_policy_is_refused_with_what_there_is(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        parse_policy(text)


# --- capacity ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    """The runs made of a pretended engine that holds up to the rate that its policy's name says, and no more."""
    made: list[Run] = []

    def pretended(experiment: Experiment, runs: Sequence[Run], jobs: int = 1) -> Iterator[dict[str, Any]]:
        made.extend(runs)
        return iter([{"slo_adherence": 1.0 if run.qps <= float(run.policy) else 0.4} for run in runs])

    monkeypatch.setattr(module, "perform_all", pretended)
    return made


@pytest.mark.parametrize("holds", [0.26, 0.7, 1.0, 1.3, 8.0, 37.9, 4000.0])
def test_capacity_is_the_highest_rate_that_holds_to_two_percent(holds: float, tried: list[Run]) -> None:
    rate, records = capacity(SMALL, str(holds), [0], 0.9)
    assert rate <= holds < rate * 1.021
    assert len(records) == len(tried) < 25
    assert len({run.qps for run in tried}) == len(tried), "no rate is tried twice"


@pytest.mark.parametrize(("holds", "rate"), [(0.2, 0.0), (10_000.0, 4096.0)])
def test_capacity_has_a_least_and_a_largest_answer(holds: float, rate: float, tried: list[Run]) -> None:
    assert capacity(SMALL, str(holds), [0], 0.9)[0] == rate


def test_capacity_is_by_the_mean_over_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    def pretended(experiment: Experiment, runs: Sequence[Run], jobs: int = 1) -> Iterator[dict[str, Any]]:
        return iter([{"slo_adherence": 1.0 if run.qps <= (5 if run.seed else 20) else 0.0} for run in runs])

    monkeypatch.setattr(module, "perform_all", pretended)
    told: list[tuple[float, float]] = []
    either, _ = capacity(SMALL, "x", [0, 1], 0.5, on_try=lambda qps, got: told.append((qps, got)))
    both, _ = capacity(SMALL, "x", [0, 1], 0.9)
    assert either <= 20 < either * 1.021
    assert both <= 5 < both * 1.021
    assert {got for _, got in told} == {1.0, 0.5, 0.0}


def test_capacity_found_on_a_simulated_engine_is_kept_there_and_doubles_with_a_second(slow: str) -> None:
    experiment = Experiment(
        profile=slow, workload={"name": "small", "requests": 40, "max_output": 12}, predictor="oracle"
    )
    one, records = capacity(experiment, "fcfs", [0], 0.9, precision=0.1)
    two, _ = capacity(replace(experiment, replicas=2), "fcfs", [0], 0.9, precision=0.1)
    assert max(record["qps"] for record in records if record["slo_adherence"] >= 0.9) == pytest.approx(one, abs=1e-3)
    assert 1.6 * one < two < 3 * one


def test_a_rate_at_which_nobody_comes_is_kept() -> None:
    brief = Experiment(workload={"name": "small", "duration_s": 0.05, "max_output": 4})
    assert not brief.asked(1.0, 0)
    rate, records = capacity(brief, "fcfs", [0], 0.9, precision=0.5)
    assert rate >= 1
    assert all(record["requests"] for record in records)
