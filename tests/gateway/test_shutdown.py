"""Draining: on SIGTERM, and with requests that take longer than the drain."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
from pathlib import Path

import httpx
import pytest

from engine_adapter.step_time.linear_forms import StepTimes
from tests.fixtures.live_gateway import CHAT, chat, fast_engine, live
from tests.fixtures.live_server import eventually

CONFIG = """\
server: {port: 0, drain_s: 5}
engines: [{kind: simulated, step_times: {d: 0.05}}]
predictor: {enabled: false}
classes: {chat: {}}
default_class: chat
"""


async def test_drain_returns_false_on_timeout() -> None:
    async with live(fast_engine(times=StepTimes(d=0.05))) as antares:
        task = asyncio.create_task(antares.ask())
        await eventually(lambda: antares.gateway.ledger.open_count == 1)
        assert not await antares.gateway.drain(0.05)
        task.cancel()
        await eventually(antares.is_idle)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, chat(max_tokens=4000)),
        ("/v1/responses", {"input": "a story", "max_output_tokens": 4000}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "a story"}], "max_tokens": 4000}),
    ],
)
async def test_stream_open_after_the_drain_ends_with_an_error_event(path: str, body: dict[str, object]) -> None:
    async with live(fast_engine(times=StepTimes(d=0.02))) as antares:
        stream = {**body, "stream": True, "ignore_eos": True}
        task = asyncio.create_task(antares.ask(stream, path, x_slo_report="1"))
        await eventually(lambda: antares.engine.state.engine_running == 1)
        assert not await antares.gateway.drain(0.1)
        await antares.gateway.stop()
        answer = await task
        error = next(json.loads(line[6:]) for line in reversed(answer.text.splitlines()) if line.startswith("data: {"))
        assert (answer.status_code, error["error"]["code"]) == (200, "draining")
        assert ": antares" not in answer.text
        assert antares.outcomes["failed"] == 1
        text = antares.gateway.metrics.exposition().decode()
        assert re.search(r'antares_requests_total\{.*outcome="failed",reason="draining".*\} 1\.0', text)


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGTERM")
async def test_serve_finishes_open_requests_on_sigterm_and_exits_0(tmp_path: Path) -> None:
    (tmp_path / "antares.yaml").write_text(CONFIG)
    code = "import sys; sys.argv[0] = 'antares'; from gateway.cli import main; main()"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, "serve", "-c", str(tmp_path / "antares.yaml"),
        stderr=asyncio.subprocess.PIPE, env={**os.environ, "COLUMNS": "200"},
    )  # fmt: skip
    assert process.stderr is not None
    try:
        async with asyncio.timeout(15):
            while not (found := re.search(rb"is ready at (http://\S+)", await process.stderr.readline())):
                assert process.returncode is None
            async with httpx.AsyncClient(base_url=found[1].decode(), verify=False, timeout=10) as http:
                task = asyncio.create_task(http.post(CHAT, json=chat(max_tokens=8, ignore_eos=True)))
                while "antares_ledger_open 1.0" not in (await http.get("/metrics")).text:
                    await asyncio.sleep(0.01)
                process.send_signal(signal.SIGTERM)
                assert (await task).status_code == 200
            await process.stderr.read()
            assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
