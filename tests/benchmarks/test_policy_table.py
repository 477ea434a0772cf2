"""benchmarks.policies: every setting runs, and the page reports medians, ranges and losses of the records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.policies.page import page
from benchmarks.policies.table import AS_PUBLISHED, LOADS, POLICIES, SETTINGS, draw, experiment
from lab.simulate.experiment import Run, perform

pytestmark = pytest.mark.no_cover  # whole simulations are slow under coverage


@pytest.mark.parametrize("setting", SETTINGS)
def test_setting_makes_a_workload(setting: str) -> None:
    workload = experiment(setting, 60.0).requests(20.0, 0)
    assert len(workload) > 500
    assert (workload[-1].at_s > 100) == setting.endswith("180 s"), "a setting's own duration takes precedence"


def test_setting_runs_with_fields_of_record() -> None:
    record = perform(experiment("a100, azure-code", 5.0), Run("slack", 2.0, 0))
    assert 0 < record["goodput"] <= 2.0 * 5.0
    assert 0 < record["slo_adherence"] <= record["count_bound"] <= 1
    assert record["per_class"]


def results(slack: float = 20.0, **settings: float) -> dict[str, Any]:
    """Results in which the goodput of a policy is the length of its name, and ``slack`` for `slack`.

    ``settings`` are further settings, with the goodput of `slack` in them.
    """
    parts = [
        {
            "setting": setting,
            "stock_qps": 2.5,
            "runs": [
                {
                    "policy": policy,
                    "load": load,
                    "seed": seed,
                    "goodput": goodput if policy == "slack" else float(len(policy)),
                    "slo_adherence": 0.8,
                    "count_bound": 0.9,
                    "worst_class": 0.7,
                }
                for policy in (*POLICIES, AS_PUBLISHED)
                for load in LOADS
                for seed in (0, 1)
            ],
        }
        for setting, goodput in {"here": slack, **settings}.items()
    ]
    return {"seeds": [0, 1], "duration_s": 60.0, "keeps": 0.9, "settings": parts}


def test_page_has_goodput_ratios_and_bounds(tmp_path: Path) -> None:
    found = results()
    text = page(found, list(SETTINGS))
    assert "## here: S = 2.5/s" in text
    # The best other policy is the one with the longest name, of 22 letters.
    assert "| 2 S | 4.0 (0.0) | 2.0 (0.0) | 8.0 (0.0) | 7.0 (0.0) | 20.0 (0.0) | 22.0 (0.0) | 0.91 |" in text
    assert "0.800 (0.900), 0.70" in text
    assert "| here | 3 S | 0.91 | 2.86 | 5.00 | 0.889 |" in text
    assert '--setting "here"' in text, "the command names the settings unless all of them ran"
    assert "--setting" not in page(found, ["here"])
    draw(found["settings"][0], tmp_path / "goodput.png")
    assert (tmp_path / "goodput.png").stat().st_size > 10_000


def test_page_has_median_and_range_instead_of_mean() -> None:
    text = page(results(slack=22.0, there=33.0, extreme=220.0), list(SETTINGS))
    assert "| 2 S | 3 | 1.50 | 1.000 to 10.000 | 0 |" in text
    assert "| **1.5 S and above** | 9 | 1.50 | 1.000 to 10.000 | 0 |" in text
    assert "| 1.5 S and above, without extreme | 6 | 1.25 | 1.000 to 1.500 | 0 |" in text
    assert "`slack` loses no row." in text


def test_page_lists_rows_that_slack_loses() -> None:
    text = page(results(slack=20.0, there=33.0), list(SETTINGS))
    assert "- here at 0.5 S: 9.09% behind `scorpio, prefill first`" in text
    assert "- there" not in text


def test_page_marks_rival_without_goodput() -> None:
    found = results()
    for run in found["settings"][0]["runs"]:
        if run["policy"] == "fcfs":
            run["goodput"] = 0.0
    assert "| here | 2 S | 0.91 | 2.86 | rival at 0 | 0.889 |" in page(found, list(SETTINGS))
