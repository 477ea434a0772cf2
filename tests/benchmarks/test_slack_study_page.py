"""The page of benchmarks.slack."""

from __future__ import annotations

from itertools import pairwise

import pytest

from benchmarks.slack import trials
from benchmarks.slack.ablation import (
    FULL,
    MIN_ADMISSION_SHARE,
    REMOVALS,
)
from benchmarks.slack.best_effort_load import BACKGROUNDS
from benchmarks.slack.study_page import ALL, page
from benchmarks.slack.trials import PARTS, Trial
from tests.fixtures.slack_study import document, record, study

pytestmark = pytest.mark.no_cover  # whole simulations are slow under coverage


def test_page_has_all_rows_and_commands() -> None:
    parts = {name: [record(task) for task in make(study(seeds=(0, 1)))] for name, make in PARTS.items()}
    text = page(document() | {"parts": parts})
    assert text.startswith("# `slack`: ablation and sensitivity\n")
    everywhere = [(name, removal.effect) for name, removal in REMOVALS.items() if not removal.needs]
    for name, effect in everywhere:
        assert text.count(f"| {name} | {effect} |") >= 3 + (name != FULL)
    for row in (*trials.PREDICTIONS, *trials.CALIBRATIONS, *trials.JITTERS):
        assert text.count(f"S | {row} |") == 3
    for row in BACKGROUNDS:
        assert text.count(f"S | {row} |") == 2
    assert "`slack` without best-effort preemption |" in text
    assert "python -m benchmarks.slack.study --seeds 2 --duration 60 \\" in text
    assert "**Simulated.**" in text
    assert "| nan" not in text
    for above, line in pairwise(text.split("\n")):
        if above.startswith("|") and line.startswith("|"):
            assert above.count("|") == line.count("|")


def test_page_has_median_range_and_worst_setting() -> None:
    goodput = {"niyama-a100": 9.0, "blis-a100": 6.0, "a100, bursts": 11.0}
    tasks = [task for task in PARTS["ablation"](study()) if isinstance(task, Trial)]
    trials_of = [t for t in tasks if t.row in {FULL, "cost_weight"} and t.setting in goodput]
    searches = [t for t in PARTS["capacity"](study()) if t.row in {FULL, "hold"} and t.setting in goodput]
    text = page(
        document(
            ablation=[record(t, 10.0 if t.row == FULL else goodput[t.setting]) for t in trials_of],
            capacity=[record(s, 10.0 if s.row == FULL else 12.0) for s in searches],
        )
    )
    cell = "**0.90** (0.60 to 1.10; blis-a100)"
    assert f"| cost_weight | {REMOVALS['cost_weight'].effect} | {cell} | {cell} | - | - |" in text
    assert "| hold | decides at every change | - | - | **1.20** (1.20 to 1.20) | **1.20** (1.20 to 1.20) |" in text
    assert "over 3 settings" in text.replace("\n", " ")
    assert "| blis-a100 | 10.00 | 10.00 |" in text
    assert "--part ablation --part capacity" in text


def test_page_compares_with_complete_slack_by_seed() -> None:
    goodput = {(FULL, 0): 10.0, (FULL, 1): 20.0, ("cost_weight", 1): 16.0, ("cost_weight", 0): 8.0}
    records = [record(study(seeds=[seed]).trials(row, 2.0)[0], value) for (row, seed), value in goodput.items()]
    text = page(document(ablation=records))
    effect = REMOVALS["cost_weight"].effect
    assert f"| cost_weight | {effect} | 12.0 (5.7) | 0.80 (0.00) | 0.500 (0.000) | 3 (0) |" in text


def test_page_has_lowest_relative_admission_rate() -> None:
    records = []
    for row, goodput, least in ((FULL, 19.0, 0.44), (MIN_ADMISSION_SHARE, 20.0, 0.2)):
        rates = {ALL: (0.8, 0.7), "class 1": (least, 0.3), "tenant: cheap": (0.9, 0.9)}
        groups = {name: {"requests": 9, "admitted": a, "attained": b} for name, (a, b) in rates.items()}
        records.append(record(study().trials(row, 2.0)[0], goodput, groups=groups))
    text = page(document(tenants=records)).replace("\n", " ")
    assert "| class 1 | 0.44 | 0.55 | 0.30 | 0.20 | 0.25 | 0.30 |" in text
    assert "in any run is **0.55** with `min_admission_share` and 0.25 without." in text
    assert "Goodput is 19.0 with it and 20.0 without: it costs **5.0%**." in text


def test_page_names_lowest_ratio_to_scorpio() -> None:
    goodput = {
        ("right", "slack"): 20.0,
        ("right", "scorpio"): 10.0,
        ("wrong", "slack"): 9.0,
        ("wrong", "scorpio"): 12.0,
    }
    records = [record(study().trials(row, 2.0, column=column)[0], v) for (row, column), v in goodput.items()]
    text = page(document(mis_prediction=records))
    assert "| 2 S | wrong | 9.0, 0.50 | 12.0, 0.50 | 0.45 | 0.75 |" in text
    assert "The lowest ratio of `slack` to the better SCORPIO: **0.75** (wrong, 2 S)." in text


def test_page_names_lowest_ratio_without_learning_separately() -> None:
    goodput = {"twice at first": 12.0, "twice, not learning": 9.0}
    records = [
        record(study().trials(row, 1.0, column=column)[0], value)
        for row, slack in goodput.items()
        for column, value in (("slack", slack), ("scorpio", 10.0))
    ]
    text = page(document(mis_calibration=records)).replace("\n", " ")
    assert "**1.20** (twice at first, 1 S); not learning: **0.90** (twice, not learning, 1 S)." in text
