"""`antares bench`, as a shell sees it."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from engine_adapter.step_time.linear_forms import StepTimes
from lab.bench.cli import bench
from lab.records.table import runs_table
from lab.workload import slo_table_names, workload_names
from tests.fixtures.live_gateway import fast_engine, live

APP = typer.Typer()
APP.command()(bench)
RUNNER = CliRunner()

QUICK = ("--workload", "small", "--max-output", "8", "--qps", "40", "--requests", "8")


def run(*arguments: str) -> Result:
    return RUNNER.invoke(APP, list(arguments))


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A gateway in a thread of its own, since the command blocks."""
    found: list[str] = []
    ready, stop = threading.Event(), threading.Event()

    async def serving() -> None:
        async with live(fast_engine(times=StepTimes(d=1e-3))) as served:
            found.append(served.url)
            ready.set()
            while not stop.is_set():
                await asyncio.sleep(0.02)

    thread = threading.Thread(target=lambda: asyncio.run(serving()))
    thread.start()
    assert ready.wait(10)
    yield found[0]
    stop.set()
    thread.join(10)


def test_json_has_a_record_for_every_rate_and_seed_and_says_how_it_was_made(url: str) -> None:
    arguments = ("--seed", "3", "--seed", "4", "--policy", "ours", "--bounds-profile", "blis-a100")
    done = run(url + "/v1/", *QUICK, *arguments, "--json")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert [(run["policy"], run["qps"], run["seed"]) for run in found["runs"]] == [("ours", 40.0, 3), ("ours", 40.0, 4)]
    for record in found["runs"]:
        assert record["requests"] == 8
        assert record["finished"] == 1.0
        assert record["lengths_from_usage"] == 1.0
        assert record["count_bound"] == record["fair_bound"] == 1.0
    assert found["made_with"]["model"] == "simulated"
    assert found["made_with"]["url"] == url


def test_the_table_is_for_people(url: str) -> None:
    done = run("--url", url, *QUICK, "--endpoint", "chat", "--policy", "ours")
    assert done.exit_code == 0, done.stderr
    assert "ours" in done.stdout
    assert "100.0%" in done.stdout


def test_a_trace_needs_no_rate(url: str) -> None:
    done = run(url, "--workload", "small", "--max-output", "4", "--arrivals", "trace", "--requests", "5",
               "--speed", "40", "--json")  # fmt: skip
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["runs"][0]["requests"] == 5


def test_a_plot_is_written(url: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "runs.png"
    assert run(url, *QUICK, "--plot", str(file)).exit_code == 0
    assert file.read_bytes().startswith(b"\x89PNG")


def test_a_dead_server_is_named_and_exits_1() -> None:
    done = run("http://127.0.0.1:9", *QUICK)
    assert done.exit_code == 1
    assert "nothing answers at http://127.0.0.1:9" in done.stderr


def test_a_server_that_never_answers_gives_records_of_failures_and_exits_1() -> None:
    done = run("http://127.0.0.1:9", *QUICK, "--model", "m", "--warmup", "0", "--json")
    assert done.exit_code == 1
    assert json.loads(done.stdout)["runs"][0]["failed"] == 1.0
    assert "every request failed" in done.stderr


def test_a_server_that_refuses_the_trial_request_is_quoted(url: str) -> None:
    done = run(url + "/nowhere", *QUICK, "--model", "m")
    assert done.exit_code == 1
    assert "404" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "URL"),
        (("http://a", "--url", "http://b"), "once"),
        (("127.0.0.1:8000", "--qps", "1"), "http://"),
        (("http://a",), "--qps"),
        (("http://a", "--qps", "1"), "requests or duration_s"),
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
def test_bad_usage_exits_2_and_says_what_is_right(arguments: tuple[str, ...], said: str) -> None:
    done = run(*arguments)
    assert done.exit_code == 2
    assert said in done.stderr


def test_help_names_every_workload_and_slo_table() -> None:
    options = {parameter.name: parameter.help for parameter in typer.main.get_command(APP).params}  # type: ignore[attr-defined]
    assert all(name in options["workload"] for name in workload_names())
    assert all(name in options["slo_table"] for name in slo_table_names())


def test_the_command_loads_nothing_heavy() -> None:
    code = "import sys, lab.bench.cli; assert not {'numpy', 'aiohttp', 'matplotlib'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=20).returncode == 0


def test_the_table_shows_seeds_and_bounds_only_where_there_are_some() -> None:
    keys = ("goodput", "slo_adherence", "rejected", "failed", "ttft_violations", "tpot_violations", "count_bound",
            "fair_bound", "ttft_p50_s", "ttft_p99_s", "tpot_p50_s", "tpot_p99_s")  # fmt: skip
    plain = {"policy": "p", "qps": 1.0, "seed": 0, **dict.fromkeys(keys)}
    heads = [column.header for column in runs_table([plain]).columns]
    assert "seed" not in heads
    both = [plain | {"count_bound": 0.9, "fair_bound": 0.8}, plain | {"seed": 1}]
    assert len(runs_table(both).columns) == len(heads) + 2
