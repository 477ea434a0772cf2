"""The study of recomputation after a burst, at a tiny size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from benchmarks.slack import recomputation
from engine_adapter.step_time.profile import load_profile


def test_gate_that_counts_output_makes_no_request_late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recomputation, "MAX_STEPS", 2200)
    profile = load_profile(recomputation.PROFILE)
    old, new = (recomputation.run(counted, 18.0, 0, profile) for counted in recomputation.COUNTED)
    assert new["recomputed"] > 1000
    assert new["largest_chunk"] < old["largest_chunk"]
    assert new["late"] == 0 < old["late"]


def test_page_has_a_row_for_each_pace_and_gate(tmp_path: Path) -> None:
    counts = dict.fromkeys(("recomputed", "largest_chunk", "late_tokens", "late"), 7) | {"paced": 9}
    runs = [
        {"counted": counted, "pace_ms": pace_ms, "seed": 0} | counts
        for pace_ms in recomputation.PACES_MS
        for counted in recomputation.COUNTED
    ]
    file = tmp_path / "recomputation.json"
    file.write_text(json.dumps({"seeds": 1, "runs": runs}))
    app = typer.Typer()
    app.command()(recomputation.main)
    assert CliRunner().invoke(app, ["--page", str(file)]).exit_code == 0
    page = file.with_suffix(".md").read_text()
    assert page.count(" ms | ") == len(runs)
    assert page.count("| 7 (7 to 7)") == 4 * len(runs)
