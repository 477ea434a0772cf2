"""benchmarks.live.features without an engine: which features it tries, and what it records of each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from benchmarks.live import features
from engine_adapter.vllm.features import FEATURES


def test_every_row_is_one_of_the_documented_table() -> None:
    assert {trial.feature for trial in features.TRIALS} - {feature.name for feature in FEATURES} == {"defaults"}


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Trials without an engine: each "works", and its name is added to the list."""
    names: list[str] = []

    def run_all(trials: Any, *arguments: Any) -> Any:
        for trial in trials:
            names.append(trial.feature)
            yield {"feature": trial.feature, "result": "served"}

    monkeypatch.setattr(features, "run_all", run_all)
    return names


def run(*arguments: str) -> None:
    app = features.typer.Typer()
    app.command()(features.main)
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, result.output


def test_interrupted_run_continues_and_one_row_can_be_repeated(tmp_path: Path, tried: list[str]) -> None:
    file = tmp_path / "features.json"
    run("model", "--output", str(file), "--only", "LoRA")
    assert tried == ["LoRA"]
    run("model", "--output", str(file))
    assert sorted(tried) == sorted(trial.feature for trial in features.TRIALS)
    rows = json.loads(file.read_text())["features"]
    assert [row["feature"] for row in rows] == [trial.feature for trial in features.TRIALS]
    run("model", "--output", str(file))
    assert len(tried) == len(features.TRIALS)
    assert "| LoRA | served |  |  |" in (tmp_path / "features.md").read_text()


@pytest.mark.process
def test_failed_engine_is_recorded_with_its_message(tmp_path: Path) -> None:
    """Python cannot import vLLM's arguments from a folder that is no model."""
    trial = features.Trial("no such feature")
    (row,) = features.run_all([trial], tmp_path / "nothing", {}, 60)
    assert row["result"] == "failed"
    assert row["feature"] == "no such feature"
    assert row["why"]
