"""benchmarks.scale.gateways: it divides a small fleet, continues a file, and its page states loss and decisions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from benchmarks.scale import gateways, gateways_page

SMALL = gateways.Fleet("small", 4, 200.0, 1.0, gateways.SHORT, {"headroom": (1, 4)})


def command(*arguments: str) -> Any:
    app = typer.Typer()
    app.command()(gateways.main)
    return CliRunner().invoke(app, [*arguments])


def test_study_measures_each_number_of_gateways(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gateways, "FLEETS", (SMALL,))
    file = tmp_path / "gateways.json"
    assert command("--json", str(file)).exit_code == 0
    runs = json.loads(file.read_text())["runs"]
    assert [run["gateways"] for run in runs] == [1, 4]
    assert runs[0]["requests"] == runs[1]["requests"] > 150
    for run in runs:
        assert run["goodput"] == pytest.approx(run["slo_adherence"] * run["requests"], abs=0.1)
        assert run["policy_us"] > 0
    assert command("--page", str(file)).exit_code == 0
    assert "| `headroom` | 4 | 1 |" in (tmp_path / "gateways.md").read_text()


def test_study_continues_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gateways, "FLEETS", (SMALL,))
    file = tmp_path / "gateways.json"
    known = [{"fleet": "small", "routing": "headroom", "gateways": count, "seed": 0} for count in (1, 4)]
    file.write_text(json.dumps({"runs": known}))
    monkeypatch.setattr(gateways, "measure", pytest.fail)
    assert command("--json", str(file)).exit_code == 0


def run(gateways: int, goodput: float, seed: int = 0, **more: Any) -> dict[str, Any]:
    return {
        "fleet": "f", "routing": "headroom", "gateways": gateways, "seed": seed, "goodput": goodput,
        "slo_adherence": goodput / 1000, "routing_us": 60.0, "policy_us": 40.0, "hit_rate": None, **more,
    }  # fmt: skip


def test_page_states_the_loss_against_one_gateway() -> None:
    fleet = {"fleet": "f", "engines": 8, "qps": 1000.0, "duration_s": 1.0, "max_prompt": 100, "max_output": 10}
    runs = [run(1, 990.0), run(4, 891.0), run(1, 1000.0, seed=1), run(4, 900.0, seed=1)]
    text = gateways_page.page({"slots": 8, "fleets": [fleet], "runs": runs})
    assert "Seeds: 0, 1." in text
    assert "--seeds 2 --json" in text
    assert "| `headroom` | 1 | 8 | 995 | - | 0.9950 | 60 | 40 | 10,000 |" in text
    assert "| `headroom` | 4 | 2 | 896 | 10.0% | 0.8955 | 60 | 40 | 10,000 |" in text
    assert "Prompts are cut at 100 tokens and answers at 10 tokens." in text


def test_page_of_chats_has_the_prefix_hits() -> None:
    fleet = {"fleet": "f", "engines": 2, "qps": 9.0, "duration_s": 1.0, "max_prompt": None, "max_output": None}
    text = gateways_page.page({"slots": 8, "fleets": [fleet], "runs": [run(1, 9.0, hit_rate=0.875)]})
    assert "| prefix hits |" in text
    assert "| 0.875 |" in text
    assert "cut at" not in text
