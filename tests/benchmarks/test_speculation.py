"""The study of speculative decoding, at a tiny size."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from benchmarks.speculation import bound, study
from engine_adapter.step_time.profile import Profile, Regime
from lab.workload import make_workload


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
