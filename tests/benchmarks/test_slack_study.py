"""What is taken out of `slack` is really out, and only then; wrong beliefs reach the policy; the page is the JSON's."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import typer
from typer.testing import CliRunner

from benchmarks.figures.lab import Lab
from benchmarks.slack import best_effort_load as crowds
from benchmarks.slack import study as slack_study
from benchmarks.slack.ablation import FULL, MAKING_WAY, WITHOUT, Blocking, straight_lines
from benchmarks.slack.best_effort_load import CROWDS, NOBODY, behind
from benchmarks.slack.study import CONTENDERS, PARTS, Study, Trial, play, tenants_of
from benchmarks.slack.study_page import EVERYBODY, page
from engine_adapter.engine import EngineState
from engine_adapter.step_time.curve import StepCurve
from engine_adapter.step_time.model import StepTimeModel
from engine_adapter.step_time.profile import load_profile
from gateway.policies.slack.policy import Slack
from gateway.requests.request import Request
from gateway.requests.slo import Slo
from lab.records.run_record import RequestResult
from lab.simulate.experiment import Experiment, Run
from lab.simulate.predictions import predict
from lab.simulate.replica import Replica
from lab.simulate.simulator import SimulationResult, simulate
from lab.workload import WorkloadRequest, make_workload

pytestmark = (
    pytest.mark.no_cover
)  # whole simulations, four times slower under a tracer; the rooms have tests of their own

A100 = load_profile("a100-llama3.1-8b")
BRIEF = Experiment(workload={"name": "sharegpt", "duration_s": 4.0})
CROWDED = make_workload("sharegpt", qps=120.0, duration_s=4.0, seed=3)


def came_of(name: str, workload: Sequence[WorkloadRequest] = CROWDED, **limits: Any) -> SimulationResult:
    """The workload under `slack` without the part called ``name``."""
    without = WITHOUT[name]
    with without.around():
        return simulate(workload, predict("shipped", workload, 0), replace(A100, **limits), without.make)


def asking(name: str, *, prompt: int = 100, predicted: float = 200.0, ttft: float = 2.0, tpot: float = 0.03) -> Request:
    return Request(name, "chat", 0.0, Slo(ttft, tpot), prompt, predicted)


def engine() -> EngineState:
    return EngineState(alive=True, step_time=StepTimeModel(A100.step_times()))


@cache  # not a fixture: those are set up under the tracer
def in_full() -> list[RequestResult]:
    return came_of(FULL).results


# --- without a part ---------------------------------------------------------------------------------------------------


def test_nothing_taken_out_is_the_product() -> None:
    assert WITHOUT[FULL].make() == Slack()
    assert in_full() == simulate(CROWDED, predict("shipped", CROWDED, 0), A100, Slack).results


@pytest.mark.parametrize(
    "name",
    [
        name
        for name in WITHOUT
        if name not in {FULL, "min_admission_share", "memory", "holding off", "easing", MAKING_WAY}
    ],
)
def test_without_a_part_another_thing_happens_under_overload(name: str) -> None:
    without = came_of(name).results
    assert len(without) == len(CROWDED)
    assert without != in_full()


def test_the_floor_is_taken_out_for_classes_and_tenants_alike() -> None:
    assert WITHOUT["min_admission_share"].make() == Slack(min_admission_share=0.0)


def test_without_its_part_memory_overflows_where_it_is_short() -> None:
    workload = make_workload("sharegpt", qps=60.0, duration_s=10.0, seed=1)
    with_it, without = (came_of(name, workload, kv_tokens=9000) for name in (FULL, "memory"))
    assert with_it.preemptions < without.preemptions


def test_without_holding_off_paces_that_are_all_but_the_engines_own_are_kept_under_overload() -> None:
    workload, slow = make_workload("sharegpt", qps=60.0, duration_s=15.0, seed=1), A100.at_speed(2.0).step_times()
    strict = {}
    for name in (FULL, "holding off"):
        make = WITHOUT[name].make
        served = simulate(workload, predict("shipped", workload, 0), A100, make, times=slow, learn=False).results
        strict[name] = sum(one.attained for one in served if one.request.tpot_slo_s == 0.03)
    assert strict[FULL] < 0.7 * strict["holding off"]


def test_without_easing_an_end_to_end_bound_holds_others_up_for_as_long_as_it_runs() -> None:
    workload = make_workload("code-chat", qps=60.0, duration_s=8.0, seed=1)
    with_it, without = (sum(one.attained for one in came_of(name, workload).results) for name in (FULL, "easing"))
    assert without < 0.95 * with_it


def beside(crowd: str, without: str = FULL, policy: str = "slack") -> dict[str, Any]:
    """The record of a brief trial at a load that alone is no trouble."""
    how = replace(BRIEF, workload={"name": "sharegpt", "duration_s": 10.0})
    return play(Trial(crowd, "x", 0.8, how, Run(policy, 18.0, 0), without, crowd=crowd))


def test_batch_requests_make_way_and_end_all_the_same() -> None:
    (batch,) = (name for name in CROWDS if "batch" in name)
    alone, with_it, without = beside(NOBODY), beside(batch), beside(batch, MAKING_WAY)
    assert "crowd_done_s" not in alone
    assert alone["slo_adherence"] > 0.99
    assert with_it["slo_adherence"] > 0.95
    assert without["slo_adherence"] < 0.4
    assert without["crowd_done_s"] < with_it["crowd_done_s"] < 1.25 * without["crowd_done_s"]
    assert with_it["preemptions"] > without["preemptions"] == 0


@patch.multiple(crowds, BURST_QPS=300.0, BURST_S=2.0)
def test_a_burst_at_best_effort_is_served_whole_and_costs_the_others_next_to_nothing() -> None:
    refused, served = [name for name in CROWDS if "burst" in name]
    assert beside(served)["slo_adherence"] > beside(refused)["slo_adherence"] - 0.02
    others = CROWDS[served].make(0)
    asked, predictions = behind(
        CROWDS[served], BRIEF.requests(10.0, 0), predict("shipped", BRIEF.requests(10.0, 0), 0), "shipped", 0
    )
    fates = {
        best: [
            one.outcome for one in simulate(asked, predictions, A100, Slack, best_effort=best).results[: len(others)]
        ]
        for best in (False, True)
    }
    assert set(fates[True]) == {"finished"}
    assert fates[False].count("rejected") > 100


def test_steps_that_vary_are_what_a_trial_with_them_meets() -> None:
    wild = replace(BRIEF, step_jitter=slack_study.UNSTEADY["20%, drifting by 10%"])
    one, other, steady = (play(Trial("x", "slack", 2.0, how, Run("slack", 40.0, 1))) for how in (wild, wild, BRIEF))
    assert one == other
    assert one != steady


def test_nobody_is_refused_as_late_and_all_end() -> None:
    assert {one.outcome for one in came_of("refusing").results} == {"finished"}
    assert any(one.outcome == "rejected" for one in in_full())


def test_the_first_that_does_not_fit_blocks_the_one_behind() -> None:
    # 3,500 and 1,000 prompt tokens are more than the engine's runway holds; the third is short enough.
    waiting = [asking("a", prompt=3500, ttft=1.0), asking("b", prompt=1000, ttft=1.5), asking("c", prompt=50, ttft=2.0)]
    admitted = {
        kind: [r.id for r in kind(cost_weight=0.0).decide(0.0, waiting, [], engine()).admit]
        for kind in (Slack, Blocking)
    }
    assert admitted == {Slack: ["a", "c"], Blocking: ["a"]}


def test_on_straight_lines_nothing_but_the_two_forms_is_learnt_and_afterwards_a_curve_is() -> None:
    def learnt() -> StepTimeModel:
        model = StepTimeModel(A100.step_times())
        for at in range(200):
            decodes, prefill = 1 + at % 60, 64 * (at % 7)
            model.observe(decodes, prefill, 300, A100.step_seconds(decodes, 300 * decodes, prefill, 0))
        return model

    with straight_lines():
        model = learnt()
    assert model.steps_seen == 200
    lines = StepCurve.of(model.times)
    assert model.curve.at_knots == pytest.approx(lines.at_knots)
    assert (model.curve.a, model.curve.e, model.curve.h) == (lines.a, lines.e, lines.h)
    assert model.times != A100.step_times()
    curved = learnt()
    assert curved.curve.at_knots != pytest.approx(StepCurve.of(curved.times).at_knots, rel=0.01)


# --- trials -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", PARTS)
def test_a_part_has_every_row_at_every_load_with_every_seed_and_each_once(part: str) -> None:
    trials = PARTS[part](Study(BRIEF, 20.0, [0, 1]))
    cases = [(t.row, t.column, t.load, t.run.seed, t.where) for t in trials]
    assert len(set(cases)) == len(cases)
    assert {t.run.seed for t in trials} == {0, 1}
    s_of = {"the azure-code workload": slack_study.CODE_QPS, "code and chat": slack_study.MIXED_QPS}
    assert all(t.run.qps == t.load * next((s for where, s in s_of.items() if where in t.where), 20.0) for t in trials)
    expected = {
        "ablation": 2 * (3 * (len(WITHOUT) - 1) + 2 + 2 + 2 * 2 + 2),
        "tenants": 2 * 2 * 2,
        "predictors": 2 * 3 * 3 * len(slack_study.PREDICTORS),
        "step-times": 2 * 3 * 3 * len(slack_study.BELIEFS),
        "step_jitter": 2 * 3 * 3 * len(slack_study.UNSTEADY),
        "crowds": 2 * 2 * len(CROWDS) * len(slack_study.BESIDE_CROWDS),
    }
    assert len(trials) == expected[part]


def test_the_same_trial_has_the_same_record() -> None:
    trial = Trial("x", "slack", 2.0, BRIEF, Run("slack", 40.0, 1), by_tenant=True)
    record = play(trial)
    assert record == play(trial)
    assert json.loads(json.dumps(record, allow_nan=False)) == record


@pytest.mark.parametrize("column", CONTENDERS)
def test_what_is_told_of_step_times_and_lengths_reaches_the_simulator(
    column: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[Any, ...]] = []

    def spying(asked: Any, predictions: Any, profile: Any, make: Any, **more: Any) -> SimulationResult:
        told.append((make().name, predictions, more))
        return simulate(asked, predictions, profile, make, **more)

    monkeypatch.setattr(slack_study, "simulate", spying)
    study = Study(replace(BRIEF, predictor="constant", learn=False), 20.0, [5])
    (trial,) = study.trials("x", 1.0, column, believed=2.0)
    play(trial)
    policy, mode = CONTENDERS[column]
    ((name, predictions, more),) = told
    assert (name, more["step_mode"], more["learn"]) == (policy, mode, False)
    assert len({p.tokens for p in predictions}) == 1
    assert more["times"].itl(20, 300) == pytest.approx(2 * A100.step_times().itl(20, 300))
    assert more["times"].prefill(500) == pytest.approx(2 * A100.step_times().prefill(500))


def test_whoever_is_told_of_other_step_times_has_no_better_curve_of_them() -> None:
    times = A100.at_speed(2.0).step_times()
    curve = Replica(A100, Slack(), times=times, learn=False).state.step_time.curve
    for step in ((1, 300, 0), (40, 12_000, 0), (40, 12_000, 512)):
        assert curve.step_s(*step) == pytest.approx(StepCurve.of(times).step_s(*step))


def test_a_wrong_belief_that_is_never_corrected_costs_slack_something() -> None:
    def goodput(believed: float, *, learn: bool) -> float:
        trial = Trial("x", "slack", 3.0, replace(BRIEF, learn=learn), Run("slack", 60.0, 0), believed=believed)
        return float(play(trial)["goodput"])

    assert goodput(3.0, learn=False) < 0.9 * goodput(1.0, learn=False)


# --- tenants ----------------------------------------------------------------------------------------------------------


def test_the_dearest_tenth_of_all_requests_is_one_tenants_and_the_others_are_two_halves() -> None:
    predictions = predict("shipped", CROWDED, 0)
    owners = tenants_of(CROWDED, predictions)
    tokens = [a.prompt_tokens + p.tokens for a, p in zip(CROWDED, predictions, strict=True)]
    of = {owner: [n for n, o in zip(tokens, owners, strict=True) if o == owner] for owner in set(owners)}
    assert {owner: round(len(members) / len(CROWDED), 2) for owner, members in of.items()} == {
        "dear": pytest.approx(0.1, abs=0.01), "middling": pytest.approx(0.45, abs=0.01),
        "cheap": pytest.approx(0.45, abs=0.01)
    }  # fmt: skip
    assert max(of["cheap"]) <= min(of["middling"]) <= max(of["middling"]) <= min(of["dear"])


def test_the_floor_holds_for_the_tenant_that_is_turned_away_without_it() -> None:
    longer = Experiment(workload={"name": "sharegpt", "duration_s": 20.0})
    study = Study(longer, 20.75, [0])
    records = [
        play(trial)
        for name in (FULL, "min_admission_share")
        for trial in study.trials(name, 3.0, without=name, by_tenant=True)
    ]
    shares = [r["groups"]["tenant: dear"]["admitted"] / r["groups"][EVERYBODY]["admitted"] for r in records]
    assert shares[1] < 0.4
    assert shares[0] > 0.5 - 0.05


def test_classes_and_tenants_each_add_up_to_everybody() -> None:
    groups = play(Trial(FULL, "slack", 2.0, BRIEF, Run("slack", 50.0, 2), by_tenant=True))["groups"]
    for kind, many in (("class", 6), ("tenant", 3)):
        members = [group for name, group in groups.items() if name.startswith(f"{kind}")]
        assert len(members) == many
        for share in ("admitted", "attained"):
            total = sum(group["requests"] * group[share] for group in members)
            assert total == pytest.approx(groups[EVERYBODY]["requests"] * groups[EVERYBODY][share], abs=0.5)
    assert all(0 <= group["attained"] <= group["admitted"] <= 1 for group in groups.values())


# --- page and command -------------------------------------------------------------------------------------------------


@cache
def found() -> dict[str, Any]:
    study = Study(replace(BRIEF, workload={"name": "sharegpt", "duration_s": 0.3, "max_output": 12}), 20.75, [0, 1])
    few = patch.multiple(crowds, BATCH=3, BATCH_OUTPUT=9, BURST_QPS=5.0)
    with patch.object(slack_study, "CODE_QPS", 20.75), few:
        parts = {name: slack_study.measure(study, name, Lab(None)) for name in PARTS}
    return {"seeds": [0, 1], "duration_s": 0.3, "stock_qps": 20.75, "parts": json.loads(json.dumps(parts))}


def test_the_page_has_a_line_for_every_row_and_the_command_that_makes_it() -> None:
    text = page(found())
    for name, without in WITHOUT.items():
        elsewhere = {FULL: 5, "memory": 1, "curve": 1, "easing": 2, "holding off": 1, MAKING_WAY: -3}
        assert text.count(f"| {name} | {without.says} |") == 3 + elsewhere.get(name, 0)
    for row in (*slack_study.PREDICTORS, *slack_study.BELIEFS, *slack_study.UNSTEADY):
        assert text.count(f"S | {row} |") == 3
    for row in CROWDS:
        assert text.count(f"S | {row} |") == 2
    assert f"`slack` without {MAKING_WAY} |" in text
    assert "python -m benchmarks.slack.study --seeds 2 --duration 0.3 --stock-qps 20.75 \\" in text
    assert "**Simulated**" in text
    assert "nan |" not in text
    for above, line in pairwise(text.split("\n")):
        if above.startswith("|") and line.startswith("|"):
            assert above.count("|") == line.count("|")


def test_a_part_is_compared_with_slack_in_full_seed_by_seed() -> None:
    records = [
        {"row": row, "column": "slack", "load": 2.0, "seed": seed, "goodput": goodput, "slo_adherence": 0.5,
         "preemptions": 3}
        for row, seed, goodput in ((FULL, 0, 10.0), (FULL, 1, 20.0), ("cost_weight", 1, 16.0), ("cost_weight", 0, 8.0))
    ]  # fmt: skip
    text = page(found() | {"parts": {"ablation": records}})
    says = WITHOUT["cost_weight"].says
    assert f"| thrift | {says} | 12.0 (5.7) | 0.80 (0.00) | 0.500 (0.000) | 3 (0) |" in text
    assert "benchmarks.slack.study --part ablation --seeds" in text


def test_the_floor_is_read_off_the_least_share_of_everybodys_admission_rate() -> None:
    def record(row: str, goodput: float, least: float) -> dict[str, Any]:
        groups = {EVERYBODY: (0.8, 0.7), "class 1: 0.5 s, 30 ms": (least, 0.3), "tenant: short": (0.9, 0.9)}
        return {"row": row, "load": 2.0, "seed": 0, "goodput": goodput} | {
            "groups": {name: {"requests": 9, "admitted": a, "attained": b} for name, (a, b) in groups.items()}
        }

    text = page(found() | {"parts": {"tenants": [record(FULL, 19.0, 0.44), record("min_admission_share", 20.0, 0.2)]}})
    assert "| class 1: 0.5 s, 30 ms | 0.44 | 0.55 | 0.30 | 0.20 | 0.25 | 0.30 |" in text
    flowing = text.replace("\n", " ")
    assert "any class or tenant had in any run: **0.55** with the floor, 0.25 without." in flowing
    assert "Goodput is 19.0 with it and 20.0 without: it costs **5.0%**." in flowing


def test_the_worst_case_beside_scorpio_is_named() -> None:
    goodput = {
        ("right", "slack"): 20.0,
        ("right", "scorpio"): 10.0,
        ("wrong", "slack"): 9.0,
        ("wrong", "scorpio"): 12.0,
    }
    records = [
        {"row": row, "column": column, "load": 2.0, "seed": 0, "goodput": value, "slo_adherence": 0.25}
        for (row, column), value in goodput.items()
    ]
    text = page(found() | {"parts": {"step-times": records}})
    assert "| 2 S | wrong | 9.0, 0.25 | 12.0, 0.25 | 0.45 | 0.75 |" in text
    assert "The least of `slack` over the better SCORPIO: **0.75** (wrong, 2 S)." in text


def test_the_worst_case_without_learning_is_named_apart() -> None:
    records = [
        {"row": row, "column": column, "load": 1.0, "seed": 0, "goodput": value, "slo_adherence": 0.25}
        for row, slack in (("twice at first", 12.0), ("twice, never learning", 9.0))
        for column, value in (("slack", slack), ("scorpio", 10.0))
    ]
    text = page(found() | {"parts": {"step-times": records}})
    assert "**1.20** (twice at first, 1 S); never learning: **0.90** (twice, never learning, 1 S)." in text


def invoke(*arguments: str) -> Any:
    app = typer.Typer()
    app.command()(slack_study.main)
    return CliRunner().invoke(app, arguments)


def test_an_unknown_part_is_refused_with_those_there_are() -> None:
    done = invoke("--part", "soup", "--stock-qps", "20")
    assert done.exit_code == 2
    said = " ".join(done.output.replace("│", " ").split())
    assert "there are ablation, tenants, predictors, step-times, step_jitter" in said


def test_parts_of_the_same_settings_are_kept_and_of_others_are_not(tmp_path: Path) -> None:
    path = tmp_path / "study.json"
    brief = ("--seeds", "1", "--duration", "1", "--json", str(path))

    def parts_after(*arguments: str) -> list[str]:
        done = invoke(*brief, *arguments)
        assert done.exit_code == 0, done.output
        return list(json.loads(path.read_text())["parts"])

    assert parts_after("--part", "tenants", "--stock-qps", "20") == ["tenants"]
    path.write_text(path.read_text().replace('"tenants"', '"ablation"'))
    assert parts_after("--part", "tenants", "--stock-qps", "20") == ["ablation", "tenants"]
    assert parts_after("--part", "tenants", "--stock-qps", "21") == ["tenants"]
    assert invoke("--page", str(path)).exit_code == 0
    assert path.with_suffix(".md").read_text() == page(json.loads(path.read_text()))


def test_s_is_looked_for_where_it_is_not_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(slack_study, "capacity", lambda *args, **more: (asked.append(args), (20.7512, []))[1])
    path = tmp_path / "study.json"
    assert invoke("--seeds", "3", "--duration", "1", "--part", "tenants", "--json", str(path)).exit_code == 0
    ((how, policy, seeds, keeps),) = asked
    assert (how.profile, policy, seeds, keeps) == ("a100-llama3.1-8b", "fcfs", [0, 1, 2], 0.9)
    assert json.loads(path.read_text())["stock_qps"] == 20.75
    assert not math.isnan(json.loads(path.read_text())["parts"]["tenants"][0]["goodput"])
