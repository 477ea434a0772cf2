"""The study of speculative decoding, at a tiny size."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from concurrent.futures import Executor, Future
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from benchmarks.speculation import bound, study
from benchmarks.speculation.page import losses
from engine_adapter.step_time.profile import Profile, Regime
from lab.workload import make_workload


class InThisThread(Executor):
    """Computes each call at once."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(fn(*args, **kwargs))
        return done


def test_capacity_is_found_by_bisection() -> None:
    found = study.capacity(lambda qps: 1.0 if qps <= 20 else 0.0, 0.9)
    assert 20 / (1 + study.PRECISION) <= found <= 20
    assert study.capacity(lambda qps: 0.0, 0.9) == 0.5


@pytest.mark.parametrize("drafts", ["none", "all", "chosen"])
def test_run_has_the_drafts_of_its_case(drafts: str) -> None:
    acceptance = 0.0 if drafts == "none" else 1.0
    record = study.run(study.Case("a100-llama3.1-8b", "slack", drafts, acceptance), 4.0, 4.0, 0)
    assert record["slo_adherence"] == 1
    assert (record["steps"] < 600) == (drafts != "none"), "drafts that are all accepted need fewer steps"


@pytest.mark.parametrize(
    ("slots", "limit"), [(64, "The number of slots limits them."), (80, "The pace of 30 ms limits them.")]
)
def test_page_has_a_row_for_each_case(tmp_path: Path, slots: int, limit: str) -> None:
    run = dict.fromkeys(study.FIELDS, 1.0)
    cases = [
        study.Case("p", "slack", drafts, rate)._asdict() | {"capacity": {"0.99": 10.0, "0.9": 20.0}, "runs": [run]}
        for drafts, rate in (("none", 0.0), ("all", 0.6), ("chosen", 0.6))
    ]
    none = {"acceptance": 0.0} | bound.SteadyState(12.5, 0, 64, 1.0, 0.03, 0.02)._asdict()
    one = {"acceptance": 0.6} | bound.SteadyState(15.0, 1, 64, 1.6, 0.05, 0.025)._asdict()
    steady = {"slots": slots, "best": [none, one]}
    found = {
        "drafts": 3, "seeds": 1, "duration_s": 4.0,
        "profiles": [{"profile": "p", "stock_qps": 5.0, "steady": steady, "cases": cases}],
    }  # fmt: skip
    file = tmp_path / "speculation.json"
    file.write_text(json.dumps(found))
    app = typer.Typer()
    app.command()(study.main)
    assert CliRunner().invoke(app, ["--page", str(file)]).exit_code == 0
    page = file.with_suffix(".md").read_text()
    assert "## p: S = 5/s" in page
    unwrapped = " ".join(page.split())
    assert f"64 of {slots} slots decode in steps of 30.0 ms and serve 12.5/s. {limit}" in unwrapped
    assert "capacity of `slack` at 99% is 0.80 times that" in unwrapped
    assert "| 1 | 0.6 | 64 | 1.60 | 50.0 ms | 1.28x | 15.0 (1.20x) |" in page
    assert page.count("| 10.0 (1.00x) | 20.0 (1.00x) |") == 3


def test_page_names_the_rows_that_lose() -> None:
    def row(drafts: str, capacity: float, goodput: float) -> dict[str, object]:
        case = study.Case("p", "slack", drafts, 0.0 if drafts == "none" else 0.4)._asdict()
        return case | {"capacity": {"0.9": capacity}, "runs": [{"goodput": goodput, "slo_adherence": 0.5}]}

    rows = [row("none", 10, 5), row("all", 1, 1), row("chosen", 9, 4), row("chosen", 11, 5)]
    parts = [{"profile": "p", "cases": rows}]
    assert losses(parts).splitlines()[2:] == [
        "- p, acceptance 0.4, 0 ms of drafting: lower capacity at 90%, goodput at 2 S."
    ]


def test_stopped_study_continues(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[study.Case] = []

    def measured(case: study.Case, stock_qps: float | None, seeds: int, duration_s: float) -> dict[str, object]:
        asked.append(case)
        return {**case._asdict(), "capacity": {"0.9": 10.0}, "offered": stock_qps, "of": (seeds, duration_s)}

    monkeypatch.setattr(study, "measure", measured)
    name, expected = "a100-llama3.1-8b", study.cases("a100-llama3.1-8b")
    found: dict[str, Any] = {"seeds": 1, "duration_s": 4.0, "profiles": []}
    assert len(list(islice(study.measure_missing(found, [name], InThisThread()), 3))) == 3
    assert len(found["profiles"][0]["cases"]) == 2
    asked.clear()
    assert len(list(study.measure_missing(found, [name], InThisThread()))) == len(expected) - 2
    assert asked == expected[2:]
    assert [case["drafts"] for case in found["profiles"][0]["cases"]] == [case.drafts for case in expected]
    assert {(case["offered"], case["of"]) for case in found["profiles"][0]["cases"]} == {(10.0, (1, 4.0))}


def test_study_refuses_the_file_of_other_settings(tmp_path: Path) -> None:
    file = tmp_path / "speculation.json"
    file.write_text(json.dumps({"drafts": 3, "seeds": 1, "duration_s": 4.0, "profiles": []}))
    app = typer.Typer()
    app.command()(study.main)
    result = CliRunner().invoke(app, ["--seeds", "2", "--json", str(file)])
    assert result.exit_code == 2
    assert "other settings" in result.output


def test_steady_rate_of_free_drafts_is_that_of_their_tokens() -> None:
    """A step of 10 ms whatever it computes, and no prompt to speak of: all accepted, k drafts bring 1 + k tokens."""
    profile = Profile("p", "", {}, (Regime(math.inf, 0.01, 0.0, 0.0, 0.0, 0.0, 0.0),), 64, 512, 1024, 4096)
    workload = make_workload("sharegpt", qps=10.0, duration_s=20.0, seed=0)
    plain, drafted = (bound.steady_state(profile, workload, [drafts], 1.0) for drafts in (0, 3))
    output = sum(request.output_tokens for request in workload) / len(workload)
    assert plain.qps == pytest.approx(64 / output / 0.01)
    assert drafted.qps == pytest.approx(4 * plain.qps)
    assert drafted.tokens == 4


def test_steady_state_needs_a_batch_that_keeps_the_pace() -> None:
    profile = Profile("p", "", {}, (Regime(math.inf, 0.04, 0.0, 0.0, 0.0, 0.0, 0.0),), 64, 512, 1024, 4096)
    workload = make_workload("sharegpt", qps=10.0, duration_s=2.0, seed=0)
    with pytest.raises(ValueError, match="8 decodes take longer"):
        bound.steady_state(profile, workload, [0], 0.0)
    assert bound.steady_state(profile, workload, [0, 1], 1.0).drafts == 1, "with a draft, a step may take 60 ms"


def test_best_steady_states_have_no_drafts_if_those_gain_nothing() -> None:
    found = bound.steady_states("h200-llama3.1-8b", 3, [0.4, 0.8])
    none, rarely, often = found["best"]
    assert (none["drafts"], rarely["drafts"]) == (0, 0)
    assert rarely["qps"] == none["qps"]
    assert often["qps"] > 1.1 * none["qps"]
