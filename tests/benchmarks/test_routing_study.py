"""benchmarks.routing: it compares policies on a small fleet, continues a file, and its page states seeds and ratios."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from benchmarks.routing import page, study
from gateway.scheduling.routing import ROUTINGS
from lab.simulate.experiment import Experiment, Run, perform

SMALL = study.Row("small", study.SIX, 2, (), 20.0, (study.DEFAULT, *study.VARIANTS), (1.0,), precision=1.0)


def command(*arguments: str) -> Any:
    app = typer.Typer()
    app.command()(study.main)
    return CliRunner().invoke(app, [*arguments])


def one_run(experiment: Experiment, policy: str, seeds: list[int], *_: Any, **__: Any) -> tuple[float, list[Any]]:
    """Return a rate instead of searching one, and its record."""
    return 20.0, [perform(experiment, Run(policy, 20.0, seeds[0]))]


@pytest.fixture
def file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Return where to write the results of one small row."""
    monkeypatch.setattr(study, "ROWS", (SMALL,))
    monkeypatch.setattr(study, "LARGE", ())
    monkeypatch.setattr(study, "capacity", one_run)
    return tmp_path / "routing.json"


def test_study_measures_capacity_and_goodput_of_each_policy(file: Path) -> None:
    known = set(ROUTINGS)
    tuned = next(iter(study.VARIANTS))
    options = ("--routing", study.DEFAULT, "--routing", tuned, "--seeds", "1", "--duration", "1", "--json", str(file))
    assert command(*options).exit_code == 0
    (row,) = json.loads(file.read_text())["rows"]
    assert [one["routing"] for one in row["found"]] == [study.DEFAULT, tuned]
    assert [(run["routing"], run["load"]) for run in row["runs"]] == [(study.DEFAULT, 1.0), (tuned, 1.0)]
    assert row["found"][0]["qps"] > 0
    run = row["runs"][0]
    assert run["goodput"] == pytest.approx(run["slo_adherence"] * run["requests"], abs=0.1)
    assert set(ROUTINGS) == known, "the variants are for the study alone"
    before = file.read_text()
    assert command(*options).exit_code == 0
    assert file.read_text() == before, "nothing is measured twice"


def test_study_measures_the_same_with_several_processes(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("--seeds", "2", "--duration", "1")
    monkeypatch.setattr(study, "LARGE", (study.Large(2, "headroom", 0.5, study.DEFAULT, 0.5, SMALL.name),))
    assert command(*options, "--json", str(file)).exit_code == 0
    other = file.with_name("other.json")
    assert command(*options, "--jobs", "2", "--json", str(other)).exit_code == 0
    one, two = (without_times(json.loads(path.read_text())) for path in (file, other))
    assert one == two


def test_row_that_shows_a_trend_has_the_first_seed_only(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "ROWS", (dataclasses.replace(SMALL, trend=True, loads=()),))
    assert command("--seeds", "3", "--duration", "1", "--routing", study.DEFAULT, "--json", str(file)).exit_code == 0
    (row,) = json.loads(file.read_text())["rows"]
    assert [one["seed"] for one in row["found"]] == [0]


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if not key.endswith("_us") and key != "cpu_s"}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def test_study_measures_larger_fleets_at_a_load_of_the_linear_row(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "LARGE", (study.Large(2, "headroom", 0.5, "headroom", 0.5),))
    linear = part(study.LINEAR_ROW, [found("headroom", 0, 160.0)])
    file.write_text(json.dumps({"duration_s": 1.0, "rows": [linear]}))
    monkeypatch.setattr(study, "ROWS", (dataclasses.replace(SMALL, name=study.LINEAR_ROW),))
    assert command("--row", study.MORE, "--json", str(file)).exit_code == 0
    (run,) = json.loads(file.read_text())["large"]
    assert (run["replicas"], run["load"], run["qps"], run["duration_s"]) == (2, 0.5, 20.0, 0.5)
    assert run["routing_us"] > 0
    # The same run is not measured again; one with more seconds of arrivals replaces it.
    assert command("--row", study.MORE, "--json", str(file)).exit_code == 0
    assert json.loads(file.read_text())["large"] == [run]
    monkeypatch.setattr(study, "LARGE", (study.Large(2, "headroom", 0.5, "headroom", 1.5),))
    assert command("--row", study.MORE, "--json", str(file)).exit_code == 0
    (longer,) = json.loads(file.read_text())["large"]
    assert longer["duration_s"] == 1.5
    assert longer["requests"] > run["requests"]


def test_study_rejects_an_unknown_policy() -> None:
    result = command("--routing", "random")
    assert result.exit_code == 2
    assert "headroom" in result.output


def found(routing: str, seed: int, qps: float) -> dict[str, Any]:
    return {"routing": routing, "seed": seed, "qps": qps, "routing_us": 50.0, "cpu_s": 1.0}


def part(name: str, measured: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    return {"row": name, "replicas": 8, "precision": 0.025, "found": measured, "runs": [], **more}


def document(**more: Any) -> dict[str, Any]:
    return {"slots": 8, "duration_s": 30.0, "keeps": 0.99, "rows": [], "large": [], **more}


def test_page_compares_over_the_seeds_that_both_policies_have() -> None:
    measured = [
        found("least_load", 0, 100.0), found("headroom", 0, 110.0), found("power_of_two", 0, 105.0),
        found("least_load", 1, 90.0), found("headroom", 1, 130.0),
    ]  # fmt: skip
    text = page.page(document(rows=[part("fleet", measured)]))
    assert "| fleet | 120 | 105 (`power_of_two`) | 1.05x |" in text
    assert "| `least_load` | 0, 1 | 95.0 | 11.9 | 50 |" in text
    assert "| `power_of_two` | 0 | 105 | 13.1 | 50 |" in text
    assert "study --seeds 2 --json" in text


def test_page_has_the_goodput_of_policies_with_runs() -> None:
    run = {"routing": "headroom", "load": 2.0, "goodput": 150.04, "slo_adherence": 0.75}
    measured = [found("least_load", 0, 100.0), found("headroom", 0, 110.0)]
    text = page.page(document(rows=[part("fleet", measured, runs=[run])]))
    assert "| `headroom` | 0 | 110 | 13.8 | 50 | 150.0 | 0.750 |" in text
    assert "| `least_load` | 0 | 100 | 12.5 | 50 |  |  |" in text


def test_page_separates_near_linear_runs_from_those_at_multiples_of_s() -> None:
    run = {
        "row": study.LINEAR_ROW,
        "replicas": 64,
        "duration_s": 30.0,
        "qps": 1600.0,
        "goodput": 1590.0,
        "slo_adherence": 0.994,
        "routing_us": 40.0,
    }
    large = [
        {**run, "routing": "headroom", "load": 0.95, "of": "headroom"},
        {**run, "routing": "least_load", "load": 1.0, "of": "least_load"},
        {**run, "routing": "least_load", "load": 2.0, "of": "least_load", "row": study.MIXED_ROW},
    ]
    rows = [part("fleet", [found("least_load", 0, 100.0), found("headroom", 0, 110.0)])]
    text = page.page(document(rows=rows, large=large))
    assert "| six categories, 64 A100 | 30 | 1600 | 25.0 | 0.9940 | 40 |" in text
    assert "| six categories, 64 A100 | 30 | `least_load` | 1 S | 1600 | 1590 | 0.994 | 40 |" in text
    assert "| six categories, 32 A100 and 32 H200 | 30 | `least_load` | 2 S | 1600 | 1590 | 0.994 | 40 |" in text


def test_page_states_what_speaks_against_a_new_default() -> None:
    runs = [
        {"routing": routing, "load": 2.0, "goodput": goodput, "slo_adherence": 0.8}
        for routing, goodput in (("least_load", 100.0), ("headroom", 110.0))
    ]
    lost = part("small", [found("least_load", 0, 100.0), found("headroom", 0, 90.0)])
    won = part("large", [found("least_load", 0, 100.0), found("headroom", 0, 120.0)], runs=runs)
    text = page.page(document(rows=[lost, won]))
    assert "Capacity: 0.90x to 1.20x." in text
    assert "Goodput at their multiples of S: 1.10x to 1.10x." in text
    assert "It has less capacity in this row: small." in text
