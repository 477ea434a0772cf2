"""Every figure at toy size, by the command that makes them: files, keys, and pages without holes."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.figures import qps_scaling
from benchmarks.figures.catalogue import FIGURES
from benchmarks.figures.figure import save
from benchmarks.figures.lab import Lab
from benchmarks.figures.page import load, with_block, write_pages
from benchmarks.figures.records import compared, table

pytest.importorskip("matplotlib")

ABOUT = {"figure", "simulated", "command", "seeds", "profiles"}
RUN = {"policy", "qps", "seed", "goodput", "slo_adherence", "rejected", "count_bound", "profile", "step_mode"}
RECORDS = {
    "qps_scaling": ("runs", RUN),
    "other_profiles": ("runs", RUN),
    "azure_trace": ("replays", {"policy", "profile", "trace", "lengths", "speed", "slo_met", "met", "met_at_s"}),
    "ablation": ("runs", RUN),
    "prediction": ("runs", {"policy", "predictor", "load", "goodput", "mean_output_tokens_attained"}),
    "capacity": ("capacities", {"profile", "policy", "hold", "capacity_qps", "command"}),
    "cost": ("timings", {"policy", "requests", "wall_s", "cpu_us_per_request"}),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with every figure at toy size, and the pages."""
    folder = tmp_path_factory.mktemp("figures")
    # In processes of their own, as a user runs them; coverage would make them take four times as long.
    command = [sys.executable, "-m", "benchmarks.figures", "--quick", "--output", str(folder)]
    ran = subprocess.run(
        command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=100, check=False
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    return folder


@pytest.mark.parametrize("name", FIGURES)
def test_a_figures_json_says_how_it_was_made(made, name):
    document = json.loads((made / f"{name}.json").read_text())
    assert document.keys() >= ABOUT
    assert document["simulated"] is True
    assert document["command"] == f"python -m benchmarks.figures --only {name}"


@pytest.mark.parametrize(("name", "records"), RECORDS.items())
def test_a_figures_records_have_what_its_page_needs(made, name, records):
    member, keys = records
    document = json.loads((made / f"{name}.json").read_text())
    assert document[member]
    assert all(record.keys() >= keys for record in document[member])


def test_the_page_has_every_figure_and_no_holes(made):
    page = (made / "simulated.md").read_text()
    for name, figure in FIGURES.items():
        assert f"## {figure.title}\n" in page
        assert f"]({name}.json)" in page
    prose = re.sub(r"```.*?```", "", page, flags=re.DOTALL)
    assert not re.search(r"[{}]|\bnan\b|\bNone\b|TODO|<[a-z]", prose)


def test_every_picture_on_the_page_exists(made):
    pictures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", (made / "simulated.md").read_text())
    assert len(pictures) >= len(FIGURES) - 1
    assert all((made / picture).stat().st_size > 5_000 for picture in pictures)


def test_the_index_links_to_headings_that_exist(made):
    index = (made / "README.md").read_text()
    headings = re.findall(r"^## (.+)$", (made / "simulated.md").read_text(), flags=re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    links = re.findall(r"simulated\.md#([^)]+)\)", index)
    assert len(links) == len(FIGURES)
    assert set(links) <= anchors


def test_pages_come_from_the_json_that_is_there(made, tmp_path):
    (tmp_path / "ablation.json").write_text((made / "ablation.json").read_text())
    write_pages(tmp_path)
    assert list(load(tmp_path)) == ["ablation"]
    assert "## Each guard alone" in (tmp_path / "simulated.md").read_text()


def test_json_of_other_code_is_named_with_the_command_that_makes_it_again(made, tmp_path):
    document = json.loads((made / "ablation.json").read_text())
    for run in document["runs"]:
        del run["goodput"]
    (tmp_path / "ablation.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match=r"ablation.json lacks 'goodput'.*--only ablation"):
        write_pages(tmp_path)


@pytest.mark.no_cover  # a whole simulation, as those of the other process
def test_the_same_figure_twice_is_the_same_file(made, tmp_path):
    save(FIGURES["ablation"].measure(Lab(None), True), tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (made / "ablation.json").read_bytes()


def test_what_else_an_index_says_survives():
    text = with_block("# Results\n\nFirst.\n\n## Measured\n\nReal.\n", "simulated", "one")
    assert text.index("First.") < text.index("one") < text.index("## Measured")
    again = with_block(text, "simulated", "two \\1")
    assert "one" not in again
    assert "two \\1" in again
    assert again.endswith("## Measured\n\nReal.\n")


def test_policies_are_compared_by_means_over_seeds():
    runs = [
        {"policy": "scorpio", "goodput": 9.0, "slo_adherence": 0.5},
        {"policy": "scorpio", "goodput": 11.0, "slo_adherence": 0.7},
        {"policy": "fcfs", "goodput": 2.0, "slo_adherence": 0.1},
    ]
    factor, points = compared(runs, "scorpio", "fcfs")
    assert factor == pytest.approx(5)
    assert points == pytest.approx(50)


def test_the_verdict_on_figure_4_follows_the_numbers():
    def runs(ratio):
        common = {"asked": {}, "qps": 15.0, "slo_adherence": 0.1}
        others = [{"policy": policy, "goodput": 1.0, **common} for policy in ("fcfs", "s3", "mooncake")]
        return [*others, {"policy": "scorpio", "goodput": ratio, **common, "slo_adherence": 0.9}]

    assert "is reached, from 15/s on" in qps_scaling._verdict(qps_scaling._findings(runs(9.0), {}))
    assert "is **not** reached" in qps_scaling._verdict(qps_scaling._findings(runs(3.0), {}))


def test_tables_are_markdown():
    assert table(["a", "b"], [["1", "2"]]) == "| a | b |\n|---|---|\n| 1 | 2 |"
