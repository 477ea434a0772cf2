"""Plots of run records."""

from __future__ import annotations

from pathlib import Path

import pytest

from lab.records.plot import plot_runs

RUNS = [
    {"policy": policy, "qps": qps, "seed": seed, "goodput": qps * share, "slo_adherence": share,
     "count_bound": 0.9, "fair_bound": None}
    for policy, share in (("fcfs", 0.2), ("slack", 0.7))
    for qps in (10.0, 20.0)
    for seed in (0, 1)
]  # fmt: skip


def test_extension_selects_format(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot_runs(RUNS, tmp_path / "runs.png", "a title")
    plot_runs(RUNS[:1], tmp_path / "runs.svg")
    assert (tmp_path / "runs.png").read_bytes().startswith(b"\x89PNG")
    svg = (tmp_path / "runs.svg").read_text()
    assert "<svg" in svg


def test_run_without_goodput_is_skipped(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot_runs([*RUNS, {**RUNS[0], "policy": "broken", "goodput": None}], tmp_path / "runs.png")


def test_plot_without_runs_raises(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no runs"):
        plot_runs([], tmp_path / "runs.png")
