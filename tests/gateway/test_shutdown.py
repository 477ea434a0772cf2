"""Draining: on SIGTERM, and with requests that take longer than the drain."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from engine_adapter.engine import EngineEvents, EngineLost
from engine_adapter.remote.engine import HttpEngine
from engine_adapter.step_time.linear_forms import StepTimes
from gateway.serve import EXIT_CUT
from tests.fixtures.live_gateway import CHAT, Live, chat, events, fast_engine, live
from tests.fixtures.live_server import HANG_S, eventually, serve
from tests.fixtures.served_process import served, until_said

pytestmark = pytest.mark.process

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
        running = antares.gateway.engine_queues[0].running
        await eventually(lambda: any(request.generated for request in running.values()))
        assert not await antares.gateway.drain(0.1)
        await antares.gateway.stop()
        answer = await task
        error = next(json.loads(line[6:]) for line in reversed(answer.text.splitlines()) if line.startswith("data: {"))
        assert (answer.status_code, error["error"]["code"]) == (200, "draining")
        assert ": antares" not in answer.text
        assert antares.outcomes["failed"] == 1
        text = antares.gateway.metrics.exposition().decode()
        assert re.search(r'antares_requests_total\{.*outcome="failed",reason="draining".*\} 1\.0', text)


@pytest.fixture(params=["simulated", "http"])
async def busy(request: pytest.FixtureRequest) -> AsyncIterator[Live]:
    """A gateway with one slot, in front of an engine in its process or of a server."""
    engine = fast_engine(times=StepTimes(d=0.05), max_num_seqs=1)
    if request.param == "simulated":
        async with live(engine) as antares:
            yield antares
        return
    await engine.start(EngineEvents())
    async with serve(engine.app) as url, live(HttpEngine("remote", url, max_num_seqs=1)) as antares:
        yield antares
    await engine.stop()


@pytest.mark.parametrize("stream", [True, False])
async def test_requests_that_stop_cuts_get_draining(busy: Live, stream: bool) -> None:
    body = chat(max_tokens=4000, ignore_eos=True, stream=stream)
    tasks = [asyncio.create_task(busy.ask(body, x_slo_class="free")) for _ in range(3)]
    queue = busy.gateway.engine_queues[0]
    await eventually(lambda: len(queue.waiting) == 2 and any(r.generated for r in queue.running.values()))
    await busy.gateway.drain(0.0)
    await busy.gateway.stop()
    answers = [await task for task in tasks]
    begun = [answer for answer in answers if answer.status_code == 200]
    assert len(begun) == stream
    for answer in answers:
        error = events(answer.text)[-1]["error"] if answer in begun else answer.json()["error"]
        assert error["code"] == "draining"
        assert answer in begun or (answer.status_code, answer.headers["retry-after"]) == (503, "5")
    assert busy.gateway.ledger.open_count == 0


async def test_passed_through_request_that_stop_cuts_gets_draining() -> None:
    async with live() as antares:

        async def loses_its_engine(scope: Any, receive: Any, send: Any) -> None:
            await eventually(lambda: antares.gateway.proxy.stopping)
            raise EngineLost("stopped")

        antares.engine.stub = loses_its_engine
        task = asyncio.create_task(antares.ask({"input": "a"}, "/v1/embeddings"))
        await eventually(lambda: antares.gateway.proxy.in_flight == 1)
        await antares.gateway.stop()
        assert (await task).json()["error"]["code"] == "draining"


async def test_passed_through_stream_that_stop_cuts_ends_with_draining() -> None:
    async with live() as antares:
        begun = asyncio.Event()

        async def endless(scope: Any, receive: Any, send: Any) -> None:
            headers = [(b"content-type", b"text/event-stream")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": b"data: {}\n\n", "more_body": True})
            begun.set()
            await asyncio.sleep(60)

        antares.engine.stub = endless
        task = asyncio.create_task(antares.ask({"input": "a"}, "/v1/audio/speech"))
        await begun.wait()
        await antares.gateway.stop()
        assert events((await task).text)[-1]["error"]["code"] == "draining"


async def test_request_without_its_whole_body_gets_draining() -> None:
    async with live() as antares:
        url = httpx.URL(antares.url)
        reader, writer = await asyncio.open_connection(url.host, url.port)
        writer.write(f"POST {CHAT} HTTP/1.1\r\nhost: a\r\ncontent-length: 500\r\n\r\n{{".encode())
        await eventually(lambda: antares.gateway.proxy.in_flight == 1)
        await antares.gateway.stop()
        answer = await asyncio.wait_for(reader.readuntil(b"}}"), HANG_S)
        writer.close()
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b'"code":"draining"' in answer
        assert antares.gateway.proxy.in_flight == 0


async def test_engine_that_dies_without_a_drain_is_still_named() -> None:
    async with live(fast_engine(times=StepTimes(d=0.05))) as antares:
        task = asyncio.create_task(antares.ask(chat(max_tokens=400, ignore_eos=True)))
        await eventually(lambda: antares.engine.state.engine_running)
        antares.engine.crash()
        assert (await task).json()["error"]["code"] == "engine_lost"


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGTERM")
@pytest.mark.parametrize(("drain_s", "signals"), [(0, 1), (30, 2)])
async def test_serve_answers_every_request_that_it_does_not_finish(tmp_path: Path, drain_s: int, signals: int) -> None:
    config = CONFIG.replace("drain_s: 5", f"drain_s: {drain_s}").replace("simulated,", "simulated, max_num_seqs: 4,")
    async with served(tmp_path, config) as (process, http):
        body = {"max_tokens": 2000, "ignore_eos": True}
        streams = [asyncio.create_task(http.post(CHAT, json=chat(**body, stream=True))) for _ in range(4)]
        waiting = [asyncio.create_task(http.post(CHAT, json=chat(**body))) for _ in range(8)]
        while "antares_ledger_open 12.0" not in (await http.get("/metrics")).text:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        log = await until_said(process, "draining: 12 open requests")
        # Not earlier: two signals that wait for a process are one.
        for _ in range(signals - 1):
            process.send_signal(signal.SIGTERM)
        answers = await asyncio.gather(*streams, *waiting)
        for answer in answers:
            error = events(answer.text)[-1]["error"] if answer.status_code == 200 else answer.json()["error"]
            assert error["code"] == "draining"
        assert [answer.status_code for answer in answers[4:]] == [503] * 8
        assert process.stderr is not None
        log += (await process.stderr.read()).decode()
        assert await process.wait() == EXIT_CUT
        assert "Traceback" not in log
        assert "12 requests are still open" in log


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGTERM")
async def test_serve_finishes_open_requests_on_sigterm_and_exits_0(tmp_path: Path) -> None:
    async with served(tmp_path, CONFIG) as (process, http):
        task = asyncio.create_task(http.post(CHAT, json=chat(max_tokens=8, ignore_eos=True)))
        while "antares_ledger_open 1.0" not in (await http.get("/metrics")).text:
            await asyncio.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        assert (await task).status_code == 200
        assert process.stderr is not None
        await process.stderr.read()
        assert await process.wait() == 0
