"""N-gram speculation on a real engine: the score of step-time models, and the page. No engine runs."""

from __future__ import annotations

import json
import random
from pathlib import Path

import typer
from typer.testing import CliRunner

from benchmarks.speculation import real_engine
from engine_adapter.step_report import StepReport


def steps() -> list[StepReport]:
    """Steps that take 10 ms, and 1 ms per token. Every tenth one is interrupted."""
    rng = random.Random(0)
    found = []
    for number in range(800):
        decodes = rng.randint(1, 12)
        drafts = 3 * rng.randint(0, decodes)
        seconds = (0.01 + 0.001 * (decodes + drafts)) * (9 if number % 10 == 0 else 1)
        found.append(StepReport(decodes, 0, 0.0, seconds, drafts // 3, drafts, drafts // 2))
    return found


def test_r2_is_higher_with_drafts_counted() -> None:
    found = real_engine.summary(steps())
    assert found["r2"]["drafts counted"] > 0.99
    assert found["r2"]["drafts ignored"] < 0.8
    assert found["accepted"] < found["drafts"]


def test_interrupted_steps_are_left_out() -> None:
    kept = real_engine.uninterrupted(steps())
    assert 700 <= len(kept) <= 720
    assert max(step.elapsed_s for step in kept) < 0.07


def test_page_has_a_row_for_each_load_and_policy(tmp_path: Path) -> None:
    counts = {"slo_adherence": 0.5, "goodput": 2.0, "drafts": 30, "decodes": 20, "accepted": 15}
    r2 = {"drafts ignored": 0.25, "drafts counted": 0.75}
    runs = [
        {"policy": policy, "load": load, "seed": 0, "r2": r2} | counts
        for load in real_engine.LOADS
        for policy in real_engine.POLICIES
    ]
    found = {
        "model": "m", "drafts": 3, "capacity_rps": 1.0, "requests": 9, "seeds": [0], "slo_scale": 8.0, "runs": runs,
    }  # fmt: skip
    file = tmp_path / "speculation_cpu.json"
    file.write_text(json.dumps(found))
    app = typer.Typer()
    app.command()(real_engine.main)
    assert CliRunner().invoke(app, ["--page", str(file)]).exit_code == 0
    page = file.with_suffix(".md").read_text()
    assert page.count("| 1.50 (1.50 to 1.50) | 0.50 (0.50 to 0.50) | 0.25 (0.25 to 0.25) | 0.75") == len(runs)
