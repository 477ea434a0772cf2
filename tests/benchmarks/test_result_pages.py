"""The generated pages in docs/results agree with their JSON and with the current generators."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.autoscaling import page as autoscaling_page
from benchmarks.faults import soak_page, study
from benchmarks.faults import table as fault_table
from benchmarks.figures import capacity
from benchmarks.figures.page import index_text, load, page_text
from benchmarks.isolation import http as isolation_http
from benchmarks.isolation import page as isolation_page
from benchmarks.live import fidelity_page, results_page
from benchmarks.markdown import with_block
from benchmarks.overhead import calls, decision_cost, gateway_cost, in_process
from benchmarks.overhead.peers import report as peers_report
from benchmarks.policies import page as policies_page
from benchmarks.policies.table import SETTINGS
from benchmarks.routing import page as routing_page
from benchmarks.scale import gateways_page, kill_page, report_page
from benchmarks.speculation import page as speculation

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "results"

PAGES: dict[str, Callable[[dict[str, Any]], str]] = {
    "overload": results_page.page,
    "fidelity": fidelity_page.page,
    "speculation": speculation.page,
    "policies": lambda found: policies_page.page(found, list(SETTINGS)),
    "decision_cost": decision_cost.page,
    "gateway_cost": gateway_cost.page,
    "calls": calls.page,
    "failover": study.page,
    "isolation": isolation_page.page,
    "faults": fault_table.page,
    "soak": soak_page.page,
    "isolation_http": isolation_http.page,
    "peers": peers_report.page,
    "scale": kill_page.page,
    "report_channel": report_page.page,
    "gateways": gateways_page.page,
    "routing": routing_page.page,
    "autoscaling": autoscaling_page.page,
    "in_process": in_process.page,
}


@pytest.mark.parametrize("name", PAGES)
def test_page_agrees_with_json(name: str) -> None:
    found = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    assert PAGES[name](found) == (RESULTS / f"{name}.md").read_text(encoding="utf-8")


def test_figures_page_agrees_with_json() -> None:
    assert page_text(load(RESULTS)) == (RESULTS / "simulated.md").read_text(encoding="utf-8")


def test_generated_blocks_agree_with_json() -> None:
    documents = load(RESULTS)
    live = results_page.summary(json.loads((RESULTS / "overload.json").read_text(encoding="utf-8")))
    blocks = {
        RESULTS / "README.md": ("simulated", index_text(documents)),
        ROOT / "docs" / "planning.md": ("capacity", capacity.tables(documents["capacity"])),
        ROOT / "README.md": ("results", live),
    }
    for path, (name, block) in blocks.items():
        text = path.read_text(encoding="utf-8")
        assert f"<!-- {name}:start -->" in text
        assert with_block(text, name, block) == text, path


def test_results_page_writes_page_index_and_readme(tmp_path: Path) -> None:
    file, readme = tmp_path / "overload.json", tmp_path / "top" / "README.md"
    file.write_bytes((RESULTS / "overload.json").read_bytes())
    readme.parent.mkdir()
    for path in (readme, tmp_path / "README.md"):
        path.write_text("# Title\n\nText.\n\n## More\n", encoding="utf-8")
    results_page.write_pages(file, readme)
    assert "python -m benchmarks.live.compare_policies --policy fcfs" in (tmp_path / "overload.md").read_text()
    assert "[One real engine](overload.md) at 2 times its saturation throughput" in (tmp_path / "README.md").read_text()
    assert "| `slack` | 11.77 " in readme.read_text()
    assert results_page.README == ROOT / "README.md"


@pytest.mark.parametrize("page", ["overload", "policies"])
def test_pages_say_that_rivals_are_not_tuned(page: str) -> None:
    text = (RESULTS / f"{page}.md").read_text(encoding="utf-8").lower()
    assert "published settings" in text
    assert "simulat" in text


def test_isolation_page_states_the_bound_and_that_it_is_simulated() -> None:
    found = json.loads((RESULTS / "isolation.json").read_text(encoding="utf-8"))
    assert len(found["seeds"]) == 5
    lost = isolation_page.lost_points(found["runs"])
    assert len(lost) == 5 * (len(isolation_page.LABELS) - 1)
    assert max(lost) <= 3.0
    text = (RESULTS / "isolation.md").read_text(encoding="utf-8")
    assert "**Simulated**" in text
    assert f"by more than **{max(lost):.1f} points**" in text
