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


def test_page_has_a_row_for_each_case(tmp_path: Path) -> None:
    run = dict.fromkeys(study.FIELDS, 1.0)
    cases = [
        study.Case("p", "slack", drafts, rate)._asdict() | {"capacity": {"0.99": 10.0, "0.9": 20.0}, "runs": [run]}
        for drafts, rate in (("none", 0.0), ("all", 0.6), ("chosen", 0.6))
    ]
    steady = {"none_qps": 10.0, "gains": [{"acceptance": 0.6, "drafts": 1, "gain": 1.11}]}
    found = {
        "drafts": 3, "seeds": 1, "duration_s": 4.0,
        "profiles": [{"profile": "p", "stock_qps": 5.0, "bounds": steady, "cases": cases}],
    }  # fmt: skip
    file = tmp_path / "speculation.json"
    file.write_text(json.dumps(found))
    app = typer.Typer()
    app.command()(study.main)
    assert CliRunner().invoke(app, ["--page", str(file)]).exit_code == 0
    page = file.with_suffix(".md").read_text()
    assert "## p: S = 5/s" in page
    assert "Steady state, by acceptance: 1.11x at 0.6." in page
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
    plain, drafted = (bound.steady_rate(profile, workload, drafts, 1.0) for drafts in (0, 3))
    output = sum(request.output_tokens for request in workload) / len(workload)
    assert plain == pytest.approx(64 / output / 0.01)
    assert drafted == pytest.approx(4 * plain)


def test_bounds_never_fall_below_no_drafts() -> None:
    found = bound.bounds("h200-llama3.1-8b", 3, [0.4, 0.8])
    assert [each["gain"] >= 1 for each in found["gains"]] == [True, True]
    assert found["gains"][0]["drafts"] == 0
    assert found["gains"][1]["gain"] > 1.1
