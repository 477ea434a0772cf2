"""benchmarks.slack: trials, wrong inputs of the policy, and resuming a study."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import typer
from typer.testing import CliRunner

from benchmarks import results_json
from benchmarks.figures.lab import Lab
from benchmarks.slack import best_effort_load, regression, trials
from benchmarks.slack import study as slack_study
from benchmarks.slack.ablation import (
    BEST_EFFORT_PREEMPTION,
    FULL,
    MIN_ADMISSION_SHARE,
    REMOVALS,
)
from benchmarks.slack.best_effort_load import BACKGROUNDS, BATCH_JOBS, BURST_BEST_EFFORT, BURST_REJECTED, NONE
from benchmarks.slack.study import Results, measure, measure_part, stock_rates, tenants_of
from benchmarks.slack.study_page import ALL, page
from benchmarks.slack.trials import ABLATION_SETTINGS, BASE, COLUMNS, PARTS, Search, Trial
from engine_adapter.step_time.curve import StepCurve
from engine_adapter.step_time.profile import load_profile
from gateway.policies.slack.policy import Slack
from lab.simulate.experiment import parse_policy
from lab.simulate.predictions import predict
from lab.simulate.replica import Replica
from lab.simulate.simulator import SimulationResult, simulate
from lab.workload import make_workload
from tests.fixtures.slack_study import record, study

pytestmark = pytest.mark.no_cover  # whole simulations are slow under coverage

A100 = load_profile(BASE)
OVERLOAD = make_workload("sharegpt", qps=120.0, duration_s=4.0, seed=3)


# --- trials -----------------------------------------------------------------------------------------------------------


def beside(background: str, removed: str = FULL) -> dict[str, Any]:
    """The record of a short trial of `slack` at a rate that the engine can serve."""
    short = study(10.0)
    trial = short.trials(background, 0.9, removed=removed, background=background)[0]
    return measure(trial)


@patch.multiple(best_effort_load, BATCH=500)
def test_batch_requests_are_preempted_and_finish() -> None:
    alone, full, removed = beside(NONE), beside(BATCH_JOBS), beside(BATCH_JOBS, BEST_EFFORT_PREEMPTION)
    assert "background_done_s" not in alone
    assert alone["slo_adherence"] > 0.99
    assert full["slo_adherence"] > 0.95
    assert removed["slo_adherence"] < 0.4
    assert removed["background_done_s"] < full["background_done_s"] < 1.4 * removed["background_done_s"]
    assert full["preemptions"] > removed["preemptions"] == 0


@patch.multiple(best_effort_load, BURST_QPS=300.0, BURST_S=2.0)
def test_burst_at_best_effort_finishes_and_costs_little() -> None:
    rejected, served = beside(BURST_REJECTED), beside(BURST_BEST_EFFORT)
    assert served["slo_adherence"] > rejected["slo_adherence"] - 0.02
    burst = BACKGROUNDS[BURST_BEST_EFFORT].make(0)
    predictions = predict("shipped", burst, 0)
    outcomes = [
        Counter(r.outcome for r in simulate(burst, predictions, A100, Slack, best_effort=best_effort).results)
        for best_effort in (False, True)
    ]
    assert outcomes[0]["rejected"] > 100
    assert outcomes[1] == {"finished": len(burst)}


@pytest.mark.parametrize("part", PARTS)
def test_part_has_each_case_once_with_every_seed(part: str) -> None:
    tasks = PARTS[part](study(seeds=(0, 1)))
    cases = [results_json.dumps(task.case()) for task in tasks]
    assert len(set(cases)) == len(cases)
    for task in tasks:
        assert task.setting in slack_study.SETTINGS
        if isinstance(task, Search):
            assert task.seeds == (0, 1)
        else:
            assert task.run.qps == 20.0 * task.load
    if part != "capacity":
        assert {task.case()["seed"] for task in tasks} == {0, 1}


def test_ablation_and_capacity_have_all_components_and_settings() -> None:
    everywhere = {name for name, removal in REMOVALS.items() if not removal.needs}
    wanted = {(name, setting) for name in everywhere for setting in ABLATION_SETTINGS}
    assert len(ABLATION_SETTINGS) == 8
    for load in (2.0, 3.0):
        found = [t for t in PARTS["ablation"](study()) if isinstance(t, Trial) and t.load == load and not t.condition]
        assert wanted <= {(trial.removed, trial.setting) for trial in found}
    searches = [task for task in PARTS["capacity"](study()) if isinstance(task, Search)]
    assert {(task.row, task.setting, task.adherence) for task in searches} == {
        (*w, a) for w in wanted for a in (0.9, 0.99)
    }


def test_stock_rates_cover_all_settings() -> None:
    rates = stock_rates()
    assert list(rates) == list(slack_study.SETTINGS)
    assert rates[BASE] == pytest.approx(22.4, rel=0.1)


def test_measure_returns_same_record_again() -> None:
    (trial,) = study().trials("x", 2.0, by_tenant=True)
    record = measure(trial)
    assert record == measure(trial)
    assert json.loads(results_json.dumps(record)) == record


def test_measure_searches_capacity_without_component(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def search(experiment: Any, policy: str, seeds: Any, adherence: float, **options: Any) -> tuple[float, list[Any]]:
        seen.append((parse_policy(policy), seeds, adherence, options))
        return 12.3456, []

    monkeypatch.setattr(slack_study, "capacity", search)
    record = measure(Search("cost_weight", BASE, 0.99, seeds=[4]))
    assert record == {"setting": BASE, "row": "cost_weight", "adherence": 0.99, "capacity": 12.346}
    assert seen == [(Slack(cost_weight=0.0), [4], 0.99, {"precision": 0.01})]


def test_measure_finds_capacity() -> None:
    search = Search("chunk pricing", BASE, 0.9, study(1.0).experiment(BASE), [0])
    with patch.object(slack_study, "CAPACITY_PRECISION", 0.5):
        assert measure(search)["capacity"] > 10


def test_step_jitter_changes_record() -> None:
    rows = trials.JITTERS
    steady, _, jittered = (study().trials("x", 2.0, changes={"step_jitter": jitter})[0] for jitter in rows.values())
    assert measure(jittered) == measure(jittered)
    assert measure(jittered) != measure(steady)


@pytest.mark.parametrize("column", COLUMNS)
def test_wrong_inputs_reach_simulator(column: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []

    def spy(workload: Any, predictions: Any, profile: Any, make: Any, **options: Any) -> SimulationResult:
        calls.append((make().name, predictions, options))
        return simulate(workload, predictions, profile, make, **options)

    monkeypatch.setattr(slack_study, "simulate", spy)
    changes = {"predictor": "constant", "learn": False}
    (trial,) = study(seeds=[5]).trials("x", 1.0, column=column, step_time_factor=2.0, changes=changes)
    measure(trial)
    ((name, predictions, options),) = calls
    assert (name, options["step_mode"], options["learn"]) == (*COLUMNS[column], False)
    assert len({predicted.tokens for predicted in predictions}) == 1
    assert options["times"].itl(20, 300) == pytest.approx(2 * A100.step_times().itl(20, 300))
    assert options["times"].prefill(500) == pytest.approx(2 * A100.step_times().prefill(500))


def test_replica_derives_curve_from_wrong_step_times() -> None:
    times = A100.at_speed(2.0).step_times()
    curve = Replica(A100, Slack(), times=times, learn=False).state.step_time.curve
    for step in ((1, 300, 0), (40, 12_000, 0), (40, 12_000, 512)):
        assert curve.step_s(*step) == pytest.approx(StepCurve.of(times).step_s(*step))


def test_wrong_step_times_without_learning_cost_goodput() -> None:
    right, wrong = (
        measure(study().trials("x", 3.0, step_time_factor=factor, changes={"learn": False})[0])["goodput"]
        for factor in (1.0, 3.0)
    )
    assert wrong < 0.9 * right


# --- tenants ----------------------------------------------------------------------------------------------------------


def test_tenants_are_split_by_tokens() -> None:
    predictions = predict("shipped", OVERLOAD, 0)
    sizes: dict[str, list[float]] = {}
    for request, predicted, tenant in zip(OVERLOAD, predictions, tenants_of(OVERLOAD, predictions), strict=True):
        sizes.setdefault(tenant, []).append(request.prompt_tokens + predicted.tokens)
    shares = {tenant: len(members) / len(OVERLOAD) for tenant, members in sizes.items()}
    assert shares == pytest.approx({"expensive": 0.1, "medium": 0.45, "cheap": 0.45}, abs=0.02)
    assert max(sizes["cheap"]) <= min(sizes["medium"]) <= max(sizes["medium"]) <= min(sizes["expensive"])


def test_expensive_tenant_keeps_its_share_without_min_admission_share() -> None:
    relative = {}
    for name in (FULL, MIN_ADMISSION_SHARE):
        groups = measure(study(20.0).trials(name, 3.0, removed=name, by_tenant=True)[0])["groups"]
        relative[name] = groups["tenant: expensive"]["admitted"] / groups[ALL]["admitted"]
    # Tenants share engine time whatever the option says; it is for the classes.
    assert relative[MIN_ADMISSION_SHARE] > 0.5
    assert relative[FULL] > 0.5 - 0.05


def test_groups_add_up_to_all_requests() -> None:
    groups = measure(study(seeds=[2]).trials(FULL, 2.5, by_tenant=True)[0])["groups"]
    for kind, count in (("class", 6), ("tenant", 3)):
        members = [group for name, group in groups.items() if name.startswith(kind)]
        assert len(members) == count
        for share in ("admitted", "attained"):
            total = sum(group["requests"] * group[share] for group in members)
            assert total == pytest.approx(groups[ALL]["requests"] * groups[ALL][share], abs=0.5)
    assert all(0 <= group["attained"] <= group["admitted"] <= 1 for group in groups.values())


# --- command ----------------------------------------------------------------------------------------------------------


def invoke(*arguments: str) -> Any:
    app = typer.Typer()
    app.command()(slack_study.main)
    return CliRunner().invoke(app, arguments)


@pytest.mark.parametrize(
    ("option", "known"),
    [("--part", "ablation; capacity; tenants; mis-prediction; mis-calibration"), ("--settings", "a100, bursts")],
)
def test_command_rejects_unknown_name(option: str, known: str) -> None:
    done = invoke(option, "unknown")
    assert done.exit_code == 2
    assert known in " ".join(done.output.replace("│", " ").split())


def test_command_writes_json_and_page(tmp_path: Path) -> None:
    path = tmp_path / "study.json"
    done = invoke("--seeds", "1", "--duration", "2", "--part", "tenants", "--json", str(path))
    assert done.exit_code == 0, done.output
    assert "tenants: nothing: 2 measured in" in done.output
    text = path.read_text()
    assert text == results_json.dumps(json.loads(text)), "one record per line"
    assert list(json.loads(text)["parts"]) == ["tenants"]
    assert invoke("--page", str(path)).exit_code == 0
    assert path.with_suffix(".md").read_text() == page(json.loads(text))


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """(row, setting) of each task that is measured; nothing is simulated."""
    calls: list[tuple[str, str]] = []

    def fake(task: Trial | Search) -> dict[str, Any]:
        calls.append((task.row, task.setting))
        return record(task)

    monkeypatch.setattr(slack_study, "measure", fake)
    return calls


def test_study_skips_records_in_file(tmp_path: Path, measured: list[tuple[str, str]]) -> None:
    path = tmp_path / "study.json"

    def run(settings: Sequence[str], qps: float = 20.0) -> int:
        measured.clear()
        short = study(qps=qps)
        measure_part(short, "capacity", settings, Lab(None), Results(short, path))
        return len(measured)

    one = run(["blis-a100"])
    assert {setting for _, setting in measured} == {"blis-a100"}
    assert run([BASE, "blis-a100"]) == one
    assert {setting for _, setting in measured} == {BASE}
    records = json.loads(path.read_text())["parts"]["capacity"]
    assert records == [record(t) for t in PARTS["capacity"](study()) if t.setting in {BASE, "blis-a100"}]
    assert run(["blis-a100"]) == 0
    assert run(["blis-a100"], qps=21.0) == one, "records at other rates are not kept"


def test_study_writes_file_after_each_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "study.json"

    def interrupted(task: Trial | Search) -> dict[str, Any]:
        if task.row != FULL:
            raise KeyboardInterrupt
        return record(task)

    monkeypatch.setattr(slack_study, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        measure_part(study(), "tenants", [BASE], Lab(None), Results(study(), path))
    assert {found["row"] for found in json.loads(path.read_text())["parts"]["tenants"]} == {FULL}


def test_study_starts_over_from_file_of_another_layout(tmp_path: Path) -> None:
    path = tmp_path / "study.json"
    path.write_text('{"seeds": [0], "duration_s": 4.0, "stock_qps": 20.0, "parts": {"ablation": [{"row": "nothing"}]}}')
    assert Results(study(), path).document["parts"] == {}


# --- regression -------------------------------------------------------------------------------------------------------


def test_compare_returns_ratios_with_median_and_range() -> None:
    before = {"here": {"2 S": 10.0, "capacity at 90%": 4.0}, "there": {"2 S": 0.0, "capacity at 90%": 8.0}}
    after = {"here": {"2 S": 11.0, "capacity at 90%": 3.0}, "there": {"2 S": 5.0, "capacity at 90%": 8.8}}
    assert regression.compare(before, after).splitlines() == [
        "| setting | 2 S | capacity at 90% |",
        "|---|---|---|",
        "| here | 1.100 | 0.750 |",
        "| there | 1.000 | 1.100 |",
        "",
        "Median 1.050, lowest 0.750, highest 1.100.",
    ]
