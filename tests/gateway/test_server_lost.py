"""A server behind `kind: http` as a real process that is killed, started again and hung while requests come and go."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import socket
import sys
from collections import Counter

import httpx
import pytest
from live_gateway import CHAT, Live, Load, chat, events, eventually, live

from engine_adapter.http_engine import HttpEngine
from gateway import supervisor as supervisor_module
from gateway.supervisor import Supervisor

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals")


class Asking(Load):
    """A request every ten milliseconds until told to stop: plain or a stream, short or long; every fifth leaves."""

    def __init__(self, antares: Live) -> None:
        self.antares, self.random, self.ends = antares, random.Random(0), Counter[str]()

    async def ask(self) -> None:
        stream, leaves_after_s = self.random.random() < 0.5, self.random.uniform(0.01, 0.5)
        body = chat(stream=stream, max_tokens=self.random.randint(1, 100), ignore_eos=True)
        asking = self.antares.http.post(CHAT, json=body)
        if self.random.random() > 0.2:
            self.ends[how_it_ended(await asking)] += 1
            return
        try:
            async with asyncio.timeout(leaves_after_s):
                self.ends[how_it_ended(await asking)] += 1
        except TimeoutError:
            self.ends["left"] += 1

    async def more(self, whole: int) -> None:
        """Wait for so many further answers in full."""
        least = self.ends["whole"] + whole
        await eventually(lambda: self.ends["whole"] >= least, within_s=20)


def how_it_ended(answer: httpx.Response) -> str:
    """``whole``, ``error event`` or the error's code; anything else is an error of the test."""
    if answer.status_code != 200:
        return str(answer.json()["error"]["code"])
    if not answer.headers["content-type"].startswith("text/event-stream"):
        assert answer.json()["choices"][0]["finish_reason"] == "length"
        return "whole"
    assert answer.text.endswith("\n\ndata: [DONE]\n\n"), "every stream says that it is over"
    last = events(answer.text)[-1]
    if "error" in last:
        assert last["error"]["code"] == "engine_lost"
        return "error event"
    assert last["choices"][0]["finish_reason"] == "length"
    return "whole"


async def test_killing_restarting_and_hanging_it_under_load_costs_what_was_in_flight_and_loses_no_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(supervisor_module, "_BACKOFF_S", (0.05,))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "benchmarks.gateway_cost", "--engine-alone", str(port), "--step-ms", "5"]
    server = Supervisor("server", command)
    engine = HttpEngine(name="remote", base_url=f"http://127.0.0.1:{port}")
    await server.start()
    try:
        async with live(engine) as antares:
            await eventually(lambda: engine.state.alive, within_s=20)
            async with Asking(antares) as load:
                await load.more(30)
                assert load.ends.keys() <= {"whole", "left"}

                for _ in range(2):
                    await eventually(lambda: engine.state.engine_running > 5, within_s=20)
                    killed = server.pid
                    assert killed is not None
                    os.kill(killed, signal.SIGKILL)
                    await eventually(lambda killed=killed: server.pid not in {None, killed}, within_s=20)
                    await eventually(lambda: engine.state.alive, within_s=20)
                    await load.more(30)

                lost = load.ends["error event"] + load.ends["engine_lost"]
                os.kill(server.pid, signal.SIGSTOP)
                await asyncio.sleep(0.5)
                os.kill(server.pid, signal.SIGCONT)
                await load.more(30)
                assert load.ends["error event"] + load.ends["engine_lost"] == lost, "half a second is no death"
            await eventually(antares.is_idle, within_s=5)
        assert load.ends.keys() <= {"whole", "left", "error event", "engine_lost", "engine_unavailable"}, load.ends
        assert load.ends["error event"] > 0
        failed = load.ends["error event"] + load.ends["engine_lost"] + load.ends["engine_unavailable"]
        outcomes = antares.outcomes
        # Who left may have left before the gateway had the request, or when it had ended already.
        assert 0 <= outcomes["finished"] - load.ends["whole"] <= load.ends["left"], (outcomes, load.ends)
        assert 0 <= outcomes["failed"] - failed <= load.ends["left"], (outcomes, load.ends)
        assert 0 < outcomes["cancelled"] <= load.ends["left"], (outcomes, load.ends)
        assert sum(outcomes.values()) == antares.gateway.ledger.accepted <= load.ends.total()
    finally:
        await server.stop()
