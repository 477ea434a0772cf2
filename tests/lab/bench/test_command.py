"""`antares bench`: output, exit codes and error messages."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from engine_adapter.step_time.linear_forms import StepTimes
from lab.bench.cli import bench
from lab.records.table import runs_table
from lab.workload import slo_table_names, workload_names
from tests.fixtures.live_gateway import fast_engine, live

pytestmark = pytest.mark.process

APP = typer.Typer()
APP.command()(bench)
RUNNER = CliRunner()

QUICK = ("--workload", "small", "--max-output", "8", "--qps", "40", "--requests", "8", "--slo-scale", "100")
"""Options of a short run. Its bounds also hold on a busy machine."""


MODEL = ("--model", "m")


def run(*arguments: str) -> Result:
    return RUNNER.invoke(APP, list(arguments))


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """URL of a gateway that runs in its own thread, because the command blocks."""
    urls: list[str] = []
    ready, stop = threading.Event(), threading.Event()

    async def serving() -> None:
        async with live(fast_engine(times=StepTimes(d=1e-3))) as served:
            urls.append(served.url)
            ready.set()
            while not stop.is_set():
                await asyncio.sleep(0.02)

    thread = threading.Thread(target=lambda: asyncio.run(serving()))
    thread.start()
    assert ready.wait(60)
    yield urls[0]
    stop.set()
    thread.join(60)


@pytest.fixture(scope="module")
def plot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("plots") / "runs.png"


@pytest.fixture(scope="module")
def document(url: str, plot: Path) -> dict[str, Any]:
    """The JSON output of a run with two seeds, bounds and a plot."""
    options = ("--seed", "3", "--seed", "4", "--policy", "ours", "--bounds-profile", "blis-a100", "--plot", str(plot))
    result = run(url + "/v1/", *QUICK, *options, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def test_json_has_record_per_rate_and_seed(document: dict[str, Any], url: str) -> None:
    runs = document["runs"]
    assert [(record["policy"], record["qps"], record["seed"]) for record in runs] == [
        ("ours", 40.0, 3),
        ("ours", 40.0, 4),
    ]
    for record in runs:
        assert record["requests"] == 8
        assert record["finished"] == 1.0
        assert record["lengths_from_usage"] == 1.0
        assert record["count_bound"] == record["fair_bound"] == 1.0
    assert document["made_with"]["model"] == "simulated"
    assert document["made_with"]["url"] == url


@pytest.mark.usefixtures("document")
def test_plot_writes_png(plot: Path) -> None:
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_trace_needs_no_rate_and_default_output_is_table(url: str) -> None:
    options = ("--workload", "small", "--max-output", "4", "--arrivals", "trace", "--requests", "5", "--speed", "40")
    result = run("--url", url, *options, "--slo-scale", "20", "--endpoint", "chat", "--policy", "ours")
    assert result.exit_code == 0, result.stderr
    assert "ours" in result.stdout
    assert "100.0%" in result.stdout


def test_dead_server_exits_1_with_url() -> None:
    result = run("http://127.0.0.1:9", *QUICK)
    assert result.exit_code == 1
    assert "cannot connect to http://127.0.0.1:9" in result.stderr


def test_run_without_any_answer_exits_1_with_record() -> None:
    result = run("http://127.0.0.1:9", *QUICK, *MODEL, "--warmup", "0", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["runs"][0]["failed"] == 1.0
    assert "every request failed" in result.stderr


def test_failed_trial_request_exits_1_with_status(url: str) -> None:
    result = run(url + "/nowhere", *QUICK, *MODEL)
    assert result.exit_code == 1
    assert "HTTP 404" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((), "URL"),
        (("http://a", "--url", "http://b"), "once"),
        (("127.0.0.1:8000", "--qps", "1"), "http://"),
        (("http://a",), "--qps"),
        (("http://a", "--qps", "1"), "set --requests or --duration"),
        (("http://a", "--qps", "-1", "--requests", "1"), "positive"),
        (("http://a", "--qps", "1", "--requests", "1", "--workload", "nope"), "sharegpt"),
        (("http://a", "--qps", "1", "--requests", "1", "--endpoint", "nope"), "completions or chat"),
        (("http://a", "--qps", "1", "--requests", "1", "--endpoint", "chat", "--prompt-style", "ids"), "words"),
        (("http://a", "--qps", "1", "--requests", "1", "--mix", "1:2"), "CATEGORY=WEIGHT"),
        (("http://a", "--qps", "1", "--requests", "1", "--bounds-profile", "nope"), "blis-a100"),
        (("http://a", "--qps", "1", "--requests", "1", "--seed", "-1"), "seed"),
        (("http://a", "--qps", "1", "--requests", "1", "--timeout", "0"), "--timeout"),
        (("http://a", "--qps", "1", "--requests", "1", "--plot", "runs.txt"), ".png"),
    ],
)
def test_bad_usage_exits_2_with_accepted_values(arguments: tuple[str, ...], error: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert error in result.stderr


def test_help_lists_every_workload_and_slo_table() -> None:
    options = {parameter.name: parameter.help for parameter in typer.main.get_command(APP).params}  # type: ignore[attr-defined]
    assert all(name in options["workload"] for name in workload_names())
    assert all(name in options["slo_table"] for name in slo_table_names())


def test_missing_client_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    for module in ("lab.bench.load_client", "lab.bench.client_request"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    result = run("http://127.0.0.1:9", "--qps", "1")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "antares: bench needs aiohttp: pip install -e '.[bench]' in your clone\n"


def test_import_of_command_is_light() -> None:
    code = "import sys, lab.bench.cli; assert not {'numpy', 'aiohttp', 'matplotlib'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_table_has_seed_and_bounds_columns_only_if_needed() -> None:
    keys = ("goodput", "slo_adherence", "rejected", "failed", "ttft_violations", "tpot_violations", "count_bound",
            "fair_bound", "ttft_p50_s", "ttft_p99_s", "tpot_p50_s", "tpot_p99_s")  # fmt: skip
    plain = {"policy": "p", "qps": 1.0, "seed": 0, **dict.fromkeys(keys)}
    headers = [column.header for column in runs_table([plain]).columns]
    assert "seed" not in headers
    both = [plain | {"count_bound": 0.9, "fair_bound": 0.8}, plain | {"seed": 1}]
    assert len(runs_table(both).columns) == len(headers) + 2
