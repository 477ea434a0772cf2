"""Thousands of requests wait, and the event loop stays free for others."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import orjson
import pytest

from engine_adapter.engine import Message, Scope
from gateway.app import Gateway
from gateway.heap import collecting_when_quiet
from tests.fixtures.live_gateway import CHAT, StubbedEngine, chat, fast_engine, gateway_config
from tests.fixtures.live_server import eventually

pytestmark = pytest.mark.no_cover

WAITING = 4000
LONGEST_S = 0.4
"""Bound on one stall, several times what it takes on a busy machine. All answers at once take longer than that."""


@dataclass
class Heartbeat:
    """The longest time in which the event loop ran nothing else."""

    longest_s: float = 0.0

    async def beat(self) -> None:
        while True:
            before = time.monotonic()
            await asyncio.sleep(0.001)
            self.longest_s = max(self.longest_s, time.monotonic() - before)


async def ask(gateway: Gateway, statuses: list[int], number: int) -> None:
    """Send a request without a connection, and note the status of its answer."""
    body = orjson.dumps(chat(f"story {number}", max_tokens=50, ignore_eos=True))
    scope: Scope = {
        "type": "http", "http_version": "1.1", "method": "POST", "path": CHAT, "raw_path": CHAT.encode(),
        "query_string": b"", "headers": [(b"content-type", b"application/json")], "client": ("127.0.0.1", 1),
    }  # fmt: skip
    sent = asyncio.Event()

    async def receive() -> Message:
        if sent.is_set():
            await asyncio.Event().wait()
        sent.set()
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    await gateway(scope, receive, send)


@asynccontextmanager
async def many_waiting(
    ttft_ms: int = 600_000,
) -> AsyncIterator[tuple[Gateway, list[StubbedEngine], list[int], Heartbeat]]:
    """Yield a gateway with two engines on which `WAITING` requests wait, the statuses of answers, and a heartbeat."""
    engines = [fast_engine(name=name, max_num_seqs=1, restart_s=60, output_tokens=50) for name in "ab"]
    config = gateway_config(
        classes={"chat": {"ttft_ms": ttft_ms, "tpot_ms": 1000, "max_waiting": 2 * WAITING}},
        server={"max_open_requests": 2 * WAITING},
    )
    gateway, statuses, heartbeat = Gateway(config, engines, None), [], Heartbeat()
    for queue in gateway.engine_queues:
        await queue.engine.start(gateway.events_of(queue))
    async with collecting_when_quiet(lambda: gateway.open_requests):
        tasks = [asyncio.create_task(ask(gateway, statuses, number)) for number in range(WAITING)]
        await eventually(lambda: gateway.open_requests + len(statuses) >= WAITING)
        beating = asyncio.create_task(heartbeat.beat())
        try:
            yield gateway, engines, statuses, heartbeat
        finally:
            for task in (beating, *tasks):
                task.cancel()
            await asyncio.gather(beating, *tasks, return_exceptions=True)
            await gateway.stop()


Change = Callable[[Gateway, list[StubbedEngine], list[int]], Awaitable[None]]


async def crash_one(gateway: Gateway, engines: list[StubbedEngine], statuses: list[int]) -> None:
    engines[0].crash()
    await eventually(lambda: len(gateway.engine_queues[1].waiting) > 0.7 * WAITING)


async def crash_both(gateway: Gateway, engines: list[StubbedEngine], statuses: list[int]) -> None:
    for engine in engines:
        engine.crash()
    await eventually(lambda: statuses.count(503) > 0.7 * WAITING)


@pytest.mark.parametrize(("change", "ttft_ms"), [(crash_one, 600_000), (crash_both, 30_000)])
async def test_event_loop_stays_free_while_thousands_of_requests_leave_a_queue(change: Change, ttft_ms: int) -> None:
    async with many_waiting(ttft_ms) as (gateway, engines, statuses, heartbeat):
        await asyncio.sleep(0.01)
        await change(gateway, engines, statuses)
        await asyncio.sleep(0.01)
        assert heartbeat.longest_s < LONGEST_S
