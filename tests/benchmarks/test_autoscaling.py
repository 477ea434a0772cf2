"""The study of autoscaling: its rival, and its page."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from benchmarks.autoscaling import study
from benchmarks.autoscaling.page import page
from benchmarks.autoscaling.study import QueueLength, Recorded
from lab.simulate.lifecycle import FleetLoad


def _load(now: float, serving: int, requests: int) -> FleetLoad:
    return FleetLoad(now, serving, 0, 0, requests)


def test_queue_length_scaling_follows_the_rule_of_kubernetes() -> None:
    scaler = QueueLength(16)

    assert scaler.replicas(_load(0, 2, 33)) == 2  # within 10%
    assert scaler.replicas(_load(15, 2, 40)) == 3
    assert scaler.replicas(_load(30, 2, 400)) == 4  # at most twice as many
    assert scaler.replicas(_load(45, 4, 16)) == 4  # down only after five minutes
    assert scaler.replicas(_load(400, 4, 16)) == 1


def test_recorded_scaling_takes_the_highest_of_the_last_minutes() -> None:
    scaler = Recorded([(300.0, 5), (450.0, 2), (600.0, 3)], spare=1)

    assert scaler.replicas(_load(0, 4, 0)) == 4  # nothing is known yet: the number stays
    assert scaler.replicas(_load(500, 4, 0)) == 6
    assert scaler.replicas(_load(650, 4, 0)) == 4


def test_page_counts_differences_from_the_search() -> None:
    signals = [
        {"end_s": end_s, "wanted": wanted, "sampled": 0.5, "cpu_s": 7.0}
        for end_s, wanted in ((300.0, 2), (450.0, 3), (600.0, 4))
    ]
    fleet = {"name": "wanted replicas", "adherence": 0.98, "gpu_hours": 1.5, "most": 5}
    trace = {
        "trace": "azure-conv", "rate_scale": 4.0, "minutes": 10.0, "seed": 0, "signals": signals, "searched": [2, 5],
        "fleets": [fleet],
    }  # fmt: skip

    text = page({"command": "python -m benchmarks.autoscaling.study --seed 0", "traces": [trace]})

    assert "| wanted replicas of the same window | 1 of 2 | 2 of 2 | 1 |" in text
    assert "| wanted replicas of the window before | 0 of 1 | 0 of 1 | 3 |" in text
    assert "| azure-conv | wanted replicas | 0.9800 | 1.50 | 5 |" in text
    assert re.search(r"^```\n(.*)\n(.*)\n```$", text, re.MULTILINE).groups() == (  # type: ignore[union-attr]
        "python -m benchmarks.autoscaling.study --seed 0 --json docs/results/autoscaling.json",
        "python -m benchmarks.autoscaling.study --page docs/results/autoscaling.json",
    )


@pytest.mark.study
def test_stopped_study_continues_from_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "TRACES", ("azure-code",))
    monkeypatch.setattr(study, "QUEUE_TARGETS", (4,))
    file, app = tmp_path / "autoscaling.json", typer.Typer()
    app.command()(study.main)
    options = ["--rate-scale", "0.2", "--minutes", "10", "--jobs", "1", "--json", str(file)]
    assert CliRunner().invoke(app, options).exit_code == 0
    whole = json.loads(file.read_text())["traces"][0]
    assert [len(whole[key]) for key in ("signals", "searched", "fleets")] == [3, 2, 5]

    stopped = {**whole, "fleets": [{"name": "computed before"}]}
    file.write_text(json.dumps({**json.loads(file.read_text()), "traces": [stopped]}))
    assert CliRunner().invoke(app, options).exit_code == 0
    again = json.loads(file.read_text())["traces"][0]
    assert again == {**whole, "fleets": [{"name": "computed before"}, *whole["fleets"][1:]]}

    assert CliRunner().invoke(app, [*options, "--seed", "1"]).exit_code == 2
