"""benchmarks.figures at toy size: files, fields, and complete pages."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import results_json
from benchmarks.figures import qps_scaling
from benchmarks.figures.catalogue import FIGURES
from benchmarks.figures.lab import Lab
from benchmarks.figures.page import load, write_pages
from benchmarks.figures.records import compare

pytest.importorskip("matplotlib")

COMMON = {"figure", "simulated", "command", "seeds", "profiles"}
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
def figures_folder(tmp_path_factory):
    """A folder with every figure at toy size, and the pages."""
    folder = tmp_path_factory.mktemp("figures")
    # A process of its own, as a user runs it. Under coverage it would take four times as long.
    command = [sys.executable, "-m", "benchmarks.figures", "--quick", "--output", str(folder)]
    result = subprocess.run(
        command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=100, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return folder


@pytest.mark.parametrize("name", FIGURES)
def test_document_has_common_members(figures_folder, name):
    document = json.loads((figures_folder / f"{name}.json").read_text())
    assert document.keys() >= COMMON
    assert document["simulated"] is True
    assert document["command"] == f"python -m benchmarks.figures --only {name}"


@pytest.mark.parametrize(("name", "records"), RECORDS.items())
def test_records_have_fields_of_page(figures_folder, name, records):
    member, keys = records
    document = json.loads((figures_folder / f"{name}.json").read_text())
    assert document[member]
    assert all(record.keys() >= keys for record in document[member])


def test_page_has_every_figure_and_no_gaps(figures_folder):
    page = (figures_folder / "simulated.md").read_text()
    for name, figure in FIGURES.items():
        assert f"## {figure.title}\n" in page
        assert f"]({name}.json)" in page
    prose = re.sub(r"```.*?```", "", page, flags=re.DOTALL)
    assert not re.search(r"[{}]|\bnan\b|\bNone\b|TODO|<[a-z]", prose)


def test_pictures_of_page_exist(figures_folder):
    pictures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", (figures_folder / "simulated.md").read_text())
    assert len(pictures) >= len(FIGURES) - 1
    assert all((figures_folder / picture).stat().st_size > 5_000 for picture in pictures)


def test_index_links_to_existing_headings(figures_folder):
    index = (figures_folder / "README.md").read_text()
    headings = re.findall(r"^## (.+)$", (figures_folder / "simulated.md").read_text(), flags=re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    links = re.findall(r"simulated\.md#([^)]+)\)", index)
    assert len(links) == len(FIGURES)
    assert set(links) <= anchors


def test_write_pages_uses_existing_json(figures_folder, tmp_path):
    (tmp_path / "ablation.json").write_text((figures_folder / "ablation.json").read_text())
    write_pages(tmp_path)
    assert list(load(tmp_path)) == ["ablation"]
    assert "## Each guard alone" in (tmp_path / "simulated.md").read_text()


def test_write_pages_names_command_for_outdated_json(figures_folder, tmp_path):
    document = json.loads((figures_folder / "ablation.json").read_text())
    for run in document["runs"]:
        del run["goodput"]
    (tmp_path / "ablation.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match=r"ablation.json lacks 'goodput'.*--only ablation"):
        write_pages(tmp_path)


@pytest.mark.no_cover  # whole simulations are slow under coverage
def test_same_figure_twice_writes_same_file(figures_folder, tmp_path):
    results_json.write(FIGURES["ablation"].measure(Lab(None), True), tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (figures_folder / "ablation.json").read_bytes()


def test_compare_uses_means_over_seeds():
    runs = [
        {"policy": "scorpio", "goodput": 9.0, "slo_adherence": 0.5},
        {"policy": "scorpio", "goodput": 11.0, "slo_adherence": 0.7},
        {"policy": "fcfs", "goodput": 2.0, "slo_adherence": 0.1},
    ]
    factor, points = compare(runs, "scorpio", "fcfs")
    assert factor == pytest.approx(5)
    assert points == pytest.approx(50)


def test_verdict_of_figure_4_follows_numbers():
    def verdict(ratio):
        common = {"workload_options": {}, "qps": 15.0, "slo_adherence": 0.1}
        others = [{"policy": policy, "goodput": 1.0, **common} for policy in ("fcfs", "s3", "mooncake")]
        runs = [*others, {"policy": "scorpio", "goodput": ratio, **common, "slo_adherence": 0.9}]
        return qps_scaling.verdict(qps_scaling.findings_of(runs, {}))

    assert "is reached, from 15/s on" in verdict(9.0)
    assert "is **not** reached" in verdict(3.0)
