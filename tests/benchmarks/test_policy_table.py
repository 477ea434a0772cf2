"""The table of policies: every setting can be simulated, and the page says what the records say."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.policies.table import AS_PUBLISHED, LOADS, POLICIES, SETTINGS, draw, experiment, page
from lab.simulate.experiment import Run, perform

pytestmark = pytest.mark.no_cover  # whole simulations


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_setting_is_an_experiment(setting: str) -> None:
    asked = experiment(setting, 60.0).requests(20.0, 0)
    assert len(asked) > 500
    assert (asked[-1].at_s > 100) == setting.endswith("180 s"), "a setting's own duration goes first"


def test_a_setting_is_simulated_with_what_its_record_needs() -> None:
    record = perform(experiment("a100, azure-code", 5.0), Run("slack", 2.0, 0))
    assert 0 < record["goodput"] <= 2.0 * 5.0
    assert 0 < record["slo_adherence"] <= record["count_bound"] <= 1
    assert record["per_class"]


def found() -> dict[str, object]:
    """Records in which a policy attains as many requests a second as its name has letters; `slack` three times more."""
    runs = [
        {
            "policy": policy, "load": load, "seed": seed, "goodput": len(policy) * (4.0 if policy == "slack" else 1.0),
            "slo_adherence": 0.8, "count_bound": 0.9, "worst_class": 0.7,
        }
        for policy in (*POLICIES, AS_PUBLISHED)
        for load in LOADS
        for seed in (0, 1)
    ]  # fmt: skip
    return {"seeds": [0, 1], "duration_s": 60.0, "settings": [{"setting": "here", "stock_qps": 2.5, "runs": runs}]}


def test_the_page_has_goodput_ratios_and_bounds(tmp_path: Path) -> None:
    text = page(found())
    assert "## here: S = 2.5/s" in text
    # 20 for slack; the best of the others is the one with the longest name, of 22 letters.
    assert "| 2 S | 4.0 (0.0) | 2.0 (0.0) | 8.0 (0.0) | 7.0 (0.0) | 20.0 (0.0) | 22.0 (0.0) | 0.91 |" in text
    assert "0.800 (0.900), 0.70" in text
    assert "Mean ratio at 1.5 S and beyond: **0.91**; the least: 0.91." in text
    assert "| here | 3 S | 0.91 | 2.86 | 5.00 | 0.889 |" in text
    assert "--setting" in text, "not all settings: the command says which"
    draw(found()["settings"][0], tmp_path / "goodput.png")  # type: ignore[index]
    assert (tmp_path / "goodput.png").stat().st_size > 10_000


def test_a_policy_that_attains_nothing_is_no_division_by_zero() -> None:
    records = found()
    for run in records["settings"][0]["runs"]:  # type: ignore[index]
        if run["policy"] == "fcfs":
            run["goodput"] = 0.0
    assert "| here | 2 S | 0.91 | 2.86 | all | 0.889 |" in page(records)
