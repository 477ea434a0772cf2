"""The study of the prefix index, at a tiny size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks.policies import prefix_caching


def test_study_measures_all_variants_and_writes_its_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import typer

    monkeypatch.setattr(prefix_caching, "capacity", lambda *_, **__: (10.0, []))
    app = typer.Typer()
    app.command()(prefix_caching.main)
    result = CliRunner().invoke(app, ["--seeds", "1", "--duration", "5", "--workload", "agents", "--json"])
    assert result.exit_code == 0, result.output
    (part,) = json.loads(result.stdout)["workloads"]
    assert len(part["capacity"]) == len(prefix_caching.VARIANTS)
    assert len(part["runs"]) == len(prefix_caching.VARIANTS) * len(prefix_caching.LOADS)
    assert all(run["predicted_hit_rate"] == 0 for run in part["runs"] if not run["index"])
    file = tmp_path / "prefix_caching.json"
    file.write_text(result.stdout)
    assert CliRunner().invoke(app, ["--page", str(file)]).exit_code == 0
    page = file.with_suffix(".md").read_text()
    assert "## agents: S = 10/s" in page
    assert page.count("| `slack` |") == 2
    assert "Usage" in CliRunner().invoke(app, ["--workload", "nope"]).output
