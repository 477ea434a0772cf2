"""A remote server (`kind: http`) as a real process that is killed, restarted and stopped while requests are open."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import httpx
import pytest

from engine_adapter.remote.engine import HttpEngine
from gateway import supervisor as supervisor_module
from gateway.app import Gateway
from gateway.supervisor import Supervisor
from tests.fixtures.live_gateway import CHAT, Live, Load, chat, events, gateway_config, live, serving
from tests.fixtures.live_server import eventually
from tests.fixtures.ports import free_port

pytestmark = [pytest.mark.process, pytest.mark.skipif(sys.platform == "win32", reason="signals")]

LOOSE = {"chat": {"ttft_ms": 60_000, "tpot_ms": 1000}}
"""Bounds that leave the server time to restart on a busy machine."""


@asynccontextmanager
async def served() -> AsyncIterator[tuple[Supervisor, HttpEngine]]:
    """Yield a server process that is restarted when it dies, and an engine for it."""
    port = free_port()
    command = [sys.executable, "-m", "benchmarks.overhead.gateway_cost", "--engine-alone", str(port), "--step-ms", "5"]
    server = Supervisor("server", command)
    await server.start()
    try:
        yield server, HttpEngine(name=f"remote-{port}", base_url=f"http://127.0.0.1:{port}")
    finally:
        await server.stop()


def kill(server: Supervisor) -> int:
    """Send SIGKILL and return the killed process id."""
    killed = server.pid
    assert killed is not None
    os.kill(killed, signal.SIGKILL)
    return killed


LONG = 200
"""Tokens of a long stream, which takes a second."""


class MixedLoad(Load):
    """Plain and streamed, short and long requests. Every fifth client disconnects early. ``ends`` counts the ends."""

    def __init__(self, antares: Live) -> None:
        self.antares, self.random, self.ends = antares, random.Random(0), Counter[str]()

    async def ask(self) -> None:
        stream, disconnect_after_s = self.random.random() < 0.5, self.random.uniform(0.01, 0.5)
        length = LONG if self.random.random() < 0.1 else self.random.randint(1, 100)
        body = chat(stream=stream or length == LONG, max_tokens=length, ignore_eos=True)
        pending = self.antares.http.post(CHAT, json=body)
        if self.random.random() > 0.2:
            self.ends[end_of(await pending)] += 1
            return
        try:
            async with asyncio.timeout(disconnect_after_s):
                self.ends[end_of(await pending)] += 1
        except TimeoutError:
            self.ends["disconnected"] += 1

    async def wait_for_streams(self, number: int = 0) -> None:
        """Wait until three long streams of engine ``number`` have begun and are far from their end."""
        running = self.antares.gateway.engine_queues[number].running
        await eventually(
            lambda: sum(r.max_tokens == LONG and 0 < r.generated < LONG / 2 for r in running.values()) >= 3, within_s=20
        )

    async def wait_for_more(self, complete: int) -> None:
        """Wait for ``complete`` further complete responses."""
        total = self.ends["complete"] + complete
        await eventually(lambda: self.ends["complete"] >= total)


def end_of(answer: httpx.Response) -> str:
    """Return ``complete``, ``error event`` or the error's code."""
    if answer.status_code != 200:
        return str(answer.json()["error"]["code"])
    if not answer.headers["content-type"].startswith("text/event-stream"):
        assert answer.json()["choices"][0]["finish_reason"] == "length"
        return "complete"
    assert answer.text.endswith("\n\ndata: [DONE]\n\n")
    last = events(answer.text)[-1]
    if "error" in last:
        assert last["error"]["code"] == "engine_lost"
        return "error event"
    assert last["choices"][0]["finish_reason"] == "length"
    return "complete"


async def test_killed_and_stopped_server_fails_only_requests_in_flight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor_module, "_BACKOFF_S", (0.05,))
    async with served() as (server, engine):
        async with live(engine, classes=LOOSE) as antares:
            antares.http.timeout = 60
            await eventually(lambda: engine.state.alive)
            async with MixedLoad(antares) as load:
                await load.wait_for_more(30)
                assert load.ends.keys() <= {"complete", "disconnected"}

                for _ in range(2):
                    await load.wait_for_streams()
                    killed = kill(server)
                    await eventually(lambda killed=killed: server.pid not in {None, killed})
                    await eventually(lambda: engine.state.alive)
                    await load.wait_for_more(30)

                lost = load.ends["error event"] + load.ends["engine_lost"]
                os.kill(server.pid, signal.SIGSTOP)
                await asyncio.sleep(0.5)
                os.kill(server.pid, signal.SIGCONT)
                await load.wait_for_more(30)
                assert load.ends["error event"] + load.ends["engine_lost"] == lost, "a pause of 0.5 s is not a crash"
            await eventually(antares.is_idle)
        assert load.ends.keys() <= {"complete", "disconnected", "error event", "engine_lost"}, load.ends
        assert load.ends["error event"] > 0
        failed = load.ends["error event"] + load.ends["engine_lost"]
        outcomes = antares.outcomes
        # A client may have disconnected before the gateway had its request, or after the response.
        assert 0 <= outcomes["finished"] - load.ends["complete"] <= load.ends["disconnected"], (outcomes, load.ends)
        assert 0 <= outcomes["failed"] - failed <= load.ends["disconnected"], (outcomes, load.ends)
        assert 0 < outcomes["cancelled"] <= load.ends["disconnected"], (outcomes, load.ends)
        assert sum(outcomes.values()) == antares.gateway.ledger.accepted <= load.ends.total()


@asynccontextmanager
async def two_servers() -> AsyncIterator[tuple[Live, list[Supervisor]]]:
    """Yield a gateway with two running servers. With equal loads, requests go to the first."""
    async with AsyncExitStack() as stack:
        pairs = [await stack.enter_async_context(served()) for _ in range(2)]
        engines = [engine for _, engine in pairs]
        gateway = Gateway(gateway_config(classes=LOOSE), list(engines))
        await gateway.start()
        stack.push_async_callback(gateway.stop)
        url = await stack.enter_async_context(serving(gateway))
        http = await stack.enter_async_context(httpx.AsyncClient(base_url=url, timeout=60, verify=False))
        await eventually(lambda: all(engine.state.alive for engine in engines))
        yield Live(gateway, engines[0], url, http), [server for server, _ in pairs]


async def test_killing_an_idle_server_of_two_fails_no_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor_module, "_BACKOFF_S", (60.0,))
    async with two_servers() as (antares, (first, _)):
        assert (await antares.ask(chat(max_tokens=1))).status_code == 200
        kill(first)
        await eventually(lambda: first.pid is None)
        # Before the next health probe, and the dead server has the smaller load.
        answers = await asyncio.gather(*(antares.ask(chat(max_tokens=20), x_slo_report="1") for _ in range(20)))
        assert {answer.status_code for answer in answers} == {200}
        assert {answer.json()["antares"]["engine"] for answer in answers} == {
            antares.gateway.engine_queues[1].engine.name
        }


async def test_killing_one_server_of_two_fails_only_its_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor_module, "_BACKOFF_S", (60.0,))
    async with two_servers() as (antares, (first, _)):
        async with MixedLoad(antares) as load:
            await load.wait_for_streams()
            kill(first)
            await eventually(lambda: not antares.engine.state.alive)
            await load.wait_for_more(100)
        assert load.ends.keys() <= {"complete", "disconnected", "error event", "engine_lost"}, load.ends
        assert load.ends["error event"] + load.ends["engine_lost"] > 0
        await eventually(antares.is_idle)
