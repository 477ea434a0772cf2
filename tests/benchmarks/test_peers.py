"""benchmarks.overhead.peers: a scripted upstream, a load client, and tables of medians over rounds."""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import typer
import yaml
from typer.testing import CliRunner

from benchmarks.overhead.peers import __main__ as command
from benchmarks.overhead.peers import processes, servers
from benchmarks.overhead.peers.client import Answers, Connection, EventCounter, Requests, error_code
from benchmarks.overhead.peers.measure import SHAPES, Shape, measure, served
from benchmarks.overhead.peers.report import (
    FIRST_BYTE,
    LOAD,
    PACED,
    Column,
    cell,
    failures,
    page,
    ratios,
    tables,
    values,
)
from benchmarks.overhead.peers.servers import BASELINE, DIRECT, OURS, PEERS, Server, chosen
from benchmarks.overhead.peers.upstream import MODEL, Upstream
from gateway.config.schema import GatewayConfig

NAMES = (DIRECT, "antares")


def record(server: str, shape: str, at: int, **changed: Any) -> dict[str, Any]:
    """Return a record in which antares is 1 ms slower than direct, in the second round 3 ms."""
    slower = (1.0 + 2 * at) * (server != DIRECT)
    keys = ("ttft_p50_ms", "ttft_p99_ms", "whole_p50_ms", "whole_p99_ms", "itl_p50_ms", "itl_p99_ms")
    return {
        "round": at, "shape": shape, "server": server, "answers": 90, "failures": 0, "error": None,
        "per_s": 1000.0 + 500 * at, **dict.fromkeys(keys, 2.0 + at + slower), "cpu_us_a_request": 400.0,
        "cpu_us_an_event": 60.0, "stream_kib": 40.0, "peak_mib": 150.0, **changed,
    }  # fmt: skip


RUNS = [record(server, shape.name, at) for at in (0, 1) for shape in SHAPES for server in NAMES]


@pytest.fixture
async def upstream() -> AsyncIterator[int]:
    server = await asyncio.get_running_loop().create_server(Upstream, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


# --- Tables -----------------------------------------------------------------------------------------------------------


def test_added_values_are_differences_within_a_round() -> None:
    added = Column("", FIRST_BYTE, "ttft_p50_ms", str, added=True)
    assert values(RUNS, "antares", added) == [1.0, 3.0]
    assert values(RUNS, "antares", Column("", FIRST_BYTE, "ttft_p50_ms", str)) == [3.0, 6.0]


def test_values_leave_out_rounds_without_one() -> None:
    runs = [record(DIRECT, LOAD, 0, ttft_p50_ms=None), record("antares", LOAD, 0), record("antares", LOAD, 1)]
    assert values(runs, "antares", Column("", LOAD, "ttft_p50_ms", str, added=True)) == []
    assert values(runs, DIRECT, Column("", LOAD, "ttft_p50_ms", str)) == []


@pytest.mark.parametrize(
    ("numbers", "text"), [([], "-"), ([2.0], "2"), ([3.0, 1.0, 2.0], "2 (1 to 3)"), ([2.1, 2.2], "2")]
)
def test_cell_has_median_and_range(numbers: list[float], text: str) -> None:
    assert cell(numbers, lambda value: f"{value:.0f}") == text


def test_tables_have_a_row_for_each_server_and_only_measured_shapes() -> None:
    heads, rows = tables(RUNS)["One connection, one request after the other"]
    assert (len(heads), [row[0] for row in rows]) == (6, list(NAMES))
    assert rows[0][1:] == ["-", "-", "-", "-", "400"]
    assert rows[1][1:3] == ["+2.00 (+1.00 to +3.00)"] * 2
    some = tables([run for run in RUNS if run["shape"] == PACED])
    assert [heads for heads, _ in some.values()] == [["server", "CPU a paced event, µs", "ITL p50, ms", "p99, ms"]]


def test_ratios_are_to_the_baseline_of_the_same_round() -> None:
    rates = {BASELINE: (500.0, 400.0), "antares": (1000.0, 1200.0), DIRECT: (9000.0, 9000.0)}
    runs = [record(server, LOAD, at, per_s=rate[at]) for server, rate in rates.items() for at in (0, 1)]
    rate = Column("", LOAD, "per_s", str)
    assert ratios(runs, rate, "antares") == [2.0, 3.0]
    assert ratios([run for run in runs if (run["server"], run["round"]) != (BASELINE, 0)], rate, "antares") == [3.0]
    heads, lines = tables(runs)[f"Multiples of {BASELINE} in the same round"]
    assert (heads, lines) == (["server", "requests/s", "CPU a request"], [["antares", "2.50 (2.00 to 3.00)", "1.00"]])
    assert not any("Multiples" in title for title in tables(RUNS))


def test_failures_name_count_and_main_cause() -> None:
    failed = {"failures": 10, "error": "status 429 queue_full"}
    assert failures([record("antares", LOAD, 0), record("antares", LOAD, 1, **failed)]) == [
        f"antares, {LOAD}: 10 of 190 failed (status 429 queue_full)"
    ]
    assert failures(RUNS) == []


def test_page_has_rows_commands_and_what_was_skipped() -> None:
    found = {"rounds": 2, "cpus": 2, "versions": {"x": "1.0"}, "skipped": ["y: not installed"], "runs": RUNS}
    text = page(found)
    assert "| antares | 1,250 (1,000 to 1,500) | 400 | 60.0 | 4.5 (3.0 to 6.0) | 4.5 (3.0 to 6.0) |" in text
    assert "python -m benchmarks.overhead.peers --rounds 2 --json > docs/results/peers.json" in text
    assert "Versions: x 1.0." in text
    assert "- y: not installed" in text
    assert max(len(line) for line in text.splitlines() if not line.startswith("|")) <= 120


# --- Client and upstream ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_event_counter_counts_events_in_pieces_of_any_size(size: int) -> None:
    body = b"data: a\n\ndata: b\n\n: comment\n\ndata: [DONE]\n\n"
    counter = EventCounter()
    assert sum(counter.count(body[at : at + size]) for at in range(0, len(body), size)) == 4


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b'{"error": {"code": "queue_full"}}', "queue_full"),
        (b'{"error": "no"}', ""),
        (b'{"detail": 1}', ""),
        (b"[]", ""),
        (b"plain", ""),
        (b"", ""),
    ],
)
def test_error_code_of_any_body(body: bytes, code: str) -> None:
    assert error_code(body) == code


def test_requests_are_unique_and_carry_key_and_bounds() -> None:
    requests = Requests(8, stream=True, pace_ms=20.0)
    one, other = requests.next(), requests.next()
    assert one != other
    head, _, body = one.partition(b"\r\n\r\n")
    assert re.findall(rb"content-length: (\d+)", head) == [b"%d" % len(body)]
    assert b"authorization: Bearer" in head
    assert b"x-slo-ttft-ms" in head
    assert json.loads(body)["max_tokens"] == 8


@pytest.mark.parametrize("stream", [False, True])
async def test_answers_of_one_connection_are_complete(upstream: int, stream: bool) -> None:
    shape = Shape("few", 1, 8, stream=stream, requests=5, seconds=10.0)
    answers, _ = await served(upstream, shape, 0)
    assert (len(answers.whole_s), answers.failures) == (5, 0)
    assert all(0 < first <= whole for first, whole in zip(answers.ttft_s, answers.whole_s, strict=True))


async def test_upstream_reports_usage_only_if_asked(upstream: int) -> None:
    async with aiohttp.ClientSession(f"http://127.0.0.1:{upstream}") as session:
        messages = [{"role": "user", "content": [{"type": "text", "text": "0 1 a"}]}]
        body: dict[str, Any] = {"model": MODEL, "max_tokens": 3, "messages": messages}
        whole = await (await session.post("/v1/chat/completions", json=body)).json()
        plain = await (await session.post("/v1/chat/completions", json=body | {"stream": True})).text()
        asked = body | {"stream": True, "stream_options": {"include_usage": True}}
        with_usage = await (await session.post("/v1/chat/completions", json=asked)).text()
        models = await (await session.get("/v1/models")).json()
        absent = await session.get("/absent")
    usage = {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6}
    assert (whole["usage"], models["data"][0]["id"], absent.status) == (usage, MODEL, 404)
    events = [line.removeprefix("data: ") for line in with_usage.split("\n\n") if line]
    assert (events[-1], json.loads(events[-2])["usage"], len(events)) == ("[DONE]", usage, 7)
    assert plain.count("data: ") == 6


async def test_paced_streams_keep_the_pace(upstream: int) -> None:
    answers, took_s = await served(upstream, Shape("paced", 3, 6, stream=True, pace_ms=20.0), 0)
    assert (len(answers.whole_s), answers.failures, answers.first_bytes) == (3, 0, 3)
    assert took_s > 0.09
    assert sum(answers.itl_s) == pytest.approx(sum(answers.whole_s) - sum(answers.ttft_s), abs=1e-3)


async def test_streams_that_do_not_end_in_time_are_failures(upstream: int) -> None:
    answers, took_s = await served(upstream, Shape("slow", 2, 100, stream=True, pace_ms=500.0, limit_s=0.2), 0)
    assert (answers.failures, answers.errors) == (2, {"not finished in time": 2})
    assert took_s < 5


async def test_refused_connection_is_a_failure(unused_tcp_port: int) -> None:
    answers, _ = await served(unused_tcp_port, Shape("few", 2, 1, stream=False, seconds=1.0), 0)
    assert answers.errors == {"connect: ConnectionRefusedError": 2}


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        (
            b"HTTP/1.1 429 No\r\ncontent-length: 31\r\n\r\n" + b'{"error":{"code":"queue_full"}}',
            "status 429 queue_full",
        ),
        (b"HTTP/1.1 500 No\r\ncontent-length: 0\r\n\r\n", "status 500"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\ndata: a\n\n", "incomplete stream"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 16\r\n\r\ndata: [DONE]\n\nxx", "incomplete stream"),
        (b"nonsense\r\n\r\n", "bad HTTP"),
        (b"", "connection closed"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\ndata", "connection closed"),
    ],
)
async def test_broken_answers_are_failures(data: bytes, cause: str) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(data)
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        answers = Answers()
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(lambda: Connection(answers), "127.0.0.1", port)
        await asyncio.wait_for(connection.send(Requests(2, True, 0.0).next(), 2, stream=True), 60)
    assert (answers.failures, len(answers.whole_s)) == (1, 0)
    assert next(iter(answers.errors)).startswith(cause)


# --- Servers ----------------------------------------------------------------------------------------------------------


def test_configuration_of_antares_is_valid_and_keeps_defaults(tmp_path: Path) -> None:
    found = {}
    for server in OURS:
        assert server.command is not None
        path = server.command(8100, "http://127.0.0.1:9", tmp_path)[-1]
        found[server.name] = GatewayConfig(**yaml.safe_load(Path(path).read_text(encoding="utf-8")))
    settings = {
        name: (config.predictor.enabled, config.policy.name, config.server.processes, len(config.engines))
        for name, config in found.items()
    }
    assert settings == {
        "antares": (True, "slack", 1, 1),
        "antares, 2 processes": (True, "slack", 2, 2),
        "antares, no predictor": (False, "slack", 1, 1),
        "antares, no predictor, fcfs": (False, "fcfs", 1, 1),
    }
    assert all(config.requires_key for config in found.values())


def test_missing_peers_are_skipped_with_how_to_install_them(tmp_path: Path) -> None:
    found, skipped = chosen(tmp_path, [])
    assert [server.name for server in found] == [DIRECT, *(server.name for server in OURS)]
    assert [line.partition(":")[0] for line in skipped] == [peer.name for peer in PEERS]
    assert all(f"{tmp_path}/{peer.name}/bin/pip install" in line for peer, line in zip(PEERS, skipped, strict=True))


@pytest.mark.parametrize(("script", "installed"), [("echo 1.2.3", True), ("exit 1", False)])
def test_installed_peer_has_version_and_command(tmp_path: Path, script: str, installed: bool) -> None:
    scripted = tmp_path / "litellm" / "bin" / "python"
    scripted.parent.mkdir(parents=True)
    scripted.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    scripted.chmod(0o755)
    found, skipped = chosen(tmp_path, ["litellm"])
    assert [server.name for server in found] == [DIRECT, *(["litellm"] if installed else [])]
    assert len(skipped) == (not installed)
    if installed:
        assert found[1].version == "1.2.3"
        assert found[1].command is not None
        words = found[1].command(8100, "http://127.0.0.1:9", tmp_path)
        assert words[0] == str(tmp_path / "litellm" / "bin" / "litellm")
        assert "api_base: http://127.0.0.1:9/v1" in Path(words[words.index("--config") + 1]).read_text()


def test_every_peer_starts_on_loopback(tmp_path: Path) -> None:
    for peer in PEERS:
        words = peer.start(tmp_path / "bin" / "python")(8100, "http://127.0.0.1:9", tmp_path)
        assert words[words.index("--host") + 1] == "127.0.0.1"
        assert words[words.index("--port") + 1] == "8100"


def test_command_rejects_unknown_servers_and_zero_rounds() -> None:
    app = typer.Typer()
    app.command()(command.main)
    unknown = CliRunner().invoke(app, ["--server", "absent"])
    assert (unknown.exit_code, "absent" in unknown.output) == (2, True)
    assert CliRunner().invoke(app, ["--rounds", "0"]).exit_code == 2


def test_default_folder_is_in_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert servers.default_folder() == Path("/caches/antares-peers")


# --- Processes --------------------------------------------------------------------------------------------------------


def test_cpu_counts_new_threads_and_never_goes_back() -> None:
    before = {(1, "1"): 5_000_000_000, (1, "2"): 1_000_000_000}
    assert processes.cpu_s(before, {(1, "1"): 6_000_000_000, (2, "2"): 500_000_000}) == 1.5


@pytest.mark.process
async def test_running_ends_the_process_and_its_children(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys, time\n"
        "subprocess.Popen([sys.executable, '-c', 'import time; sum(range(10**6)); time.sleep(60)'])\n"
        "time.sleep(60)"
    )
    async with processes.running([sys.executable, "-c", code], tmp_path / "log", {}) as process:
        async with asyncio.timeout(60):
            while len(found := processes.tree(process.pid)) < 2:
                await asyncio.sleep(0.05)
        assert processes.memory_mib(process.pid) > 1
        assert processes.peak_memory_mib(process.pid) > 1
        assert {pid for pid, _ in processes.thread_cpu_ns(process.pid)} == set(found)
    async with asyncio.timeout(60):
        while any(_alive(pid) for pid in found):
            await asyncio.sleep(0.05)


@pytest.mark.process
async def test_sigterm_ends_what_a_benchmark_runs(tmp_path: Path) -> None:
    code = (
        "import asyncio, pathlib, sys\n"
        "from benchmarks.overhead.peers import processes\n"
        "async def main():\n"
        "    command = [sys.executable, '-c', 'import time; time.sleep(60)']\n"
        "    async with processes.running(command, pathlib.Path('log'), {}) as process:\n"
        "        print(process.pid, flush=True)\n"
        "        await asyncio.sleep(60)\n"
        "asyncio.run(main())"
    )
    benchmark = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, stdout=PIPE, stderr=DEVNULL, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(servers.TREE)},
    )  # fmt: skip
    assert benchmark.stdout is not None
    async with asyncio.timeout(60):
        server = int(await benchmark.stdout.readline())
        benchmark.terminate()
        assert await benchmark.wait() != 0
    assert not _alive(server)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(") ")[2][0] != "Z"
    except OSError:
        return False


@pytest.mark.process
async def test_measure_serves_direct_and_ours() -> None:
    shapes = (
        Shape("serial", 1, 4, stream=False, requests=5, seconds=5.0),
        Shape("paced", 4, 5, stream=True, pace_ms=10.0),
    )
    found = await measure([Server(DIRECT), OURS[0]], 1, shapes, warm_ups=shapes[:1])
    assert [(run["shape"], run["server"], run["answers"], run["failures"]) for run in found] == [
        ("serial", DIRECT, 5, 0), ("serial", "antares", 5, 0), ("paced", "antares", 4, 0), ("paced", DIRECT, 4, 0),
    ]  # fmt: skip
    assert all(run["cpu_us_a_request"] > 0 and run["peak_mib"] > 1 for run in found)
    assert all(run["itl_p99_ms"] > 5 for run in found if run["shape"] == "paced")


@pytest.mark.process
async def test_server_that_does_not_start_is_named_with_its_log(tmp_path: Path) -> None:
    broken = Server(
        "broken", command=lambda port, upstream, folder: [sys.executable, "-c", "print('no luck'); exit(1)"]
    )
    with pytest.raises(RuntimeError, match=r"broken did not start[\s\S]*no luck"):
        await measure([Server(DIRECT), broken], 1, shapes=(), warm_ups=())
