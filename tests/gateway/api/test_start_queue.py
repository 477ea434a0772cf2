"""In which turn of the event loop requests start, alone and over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import pytest

from engine_adapter.engine import ASGIApp, Receive, Scope, Send
from gateway.api.connections import Connections
from gateway.api.http_protocol import HttpProtocol
from gateway.api.start_queue import ARRIVED_KEY, PER_TURN, StartQueue
from tests.fixtures.live_gateway import serving
from tests.fixtures.live_server import eventually

MANY = 10 * PER_TURN
CHAT, HEALTH = b"/v1/chat/completions", b"/health"


def enter(queue: StartQueue, name: str, started: list[str]) -> None:
    """Start a request at once or in a later turn."""
    if queue.take_turn():
        started.append(name)
    else:
        queue.wait(name, lambda: started.append(name))


async def test_few_requests_start_at_once() -> None:
    queue, started = StartQueue(), list[str]()
    for _ in range(3):
        for number in range(PER_TURN):
            enter(queue, str(number), started)
        assert (len(started), len(queue)) == (PER_TURN, 0)
        await asyncio.sleep(0)
        started.clear()


async def test_many_requests_start_in_order_a_few_each_turn() -> None:
    queue, started, counts = StartQueue(), list[str](), list[int]()
    names = [str(number) for number in range(3 * PER_TURN + 5)]
    for name in names[:-1]:
        enter(queue, name, started)
    while len(queue):
        counts.append(len(started))
        await asyncio.sleep(0)
        if len(counts) == 2:
            enter(queue, names[-1], started)  # no later request overtakes
    assert started == names
    assert [later - earlier for earlier, later in zip([0, *counts], [*counts, len(names)], strict=True)] == [
        PER_TURN, PER_TURN, PER_TURN, 5,
    ]  # fmt: skip


async def test_request_that_is_withdrawn_never_starts() -> None:
    queue, started = StartQueue(), list[str]()
    for number in range(PER_TURN + 3):
        enter(queue, str(number), started)
    queue.withdraw(str(PER_TURN + 1))
    queue.withdraw("0")
    await asyncio.sleep(0.01)
    assert started == [str(number) for number in range(PER_TURN + 3) if number != PER_TURN + 1]


async def test_later_turns_see_no_context_of_the_request_before() -> None:
    queue, seen = StartQueue(), list[int]()
    variable = contextvars.ContextVar("variable", default=0)
    variable.set(1)
    for number in range(2 * PER_TURN + 1):
        if not queue.take_turn():
            queue.wait(number, lambda: seen.append(variable.get()))
    await asyncio.sleep(0.01)
    assert seen == [0] * (PER_TURN + 1)


class Recorder:
    """An app that notes each request at its start, and when it arrived. It answers once ``answers`` is set."""

    def __init__(self) -> None:
        self.paths: list[str] = []
        self.arrived: list[float | None] = []
        self.bodies: list[bytes] = []
        self.answers = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.paths.append(scope["path"])
        self.arrived.append(scope.get(ARRIVED_KEY))
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        self.bodies.append(body)
        await self.answers.wait()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})


@asynccontextmanager
async def clients(
    app: ASGIApp, connections: Connections, count: int
) -> AsyncIterator[list[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]:
    """``count`` connections to a server of ``app``."""
    async with asyncio.timeout(30), serving(app, 0, partial(HttpProtocol, connections)) as url:
        port = int(url.rsplit(":", 1)[1])
        opened = [await asyncio.open_connection("127.0.0.1", port) for _ in range(count)]
        await eventually(lambda: len(connections) == count)
        try:
            yield opened
        finally:
            for _, writer in opened:
                writer.transport.abort()
            await eventually(lambda: len(connections) == 0)


def a_post(path: bytes, body: bytes = b"{}") -> bytes:
    return b"POST %b HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (path, len(body), body)


async def test_operator_request_starts_before_most_of_those_sent_ahead_of_it() -> None:
    app = Recorder()
    app.answers.set()
    async with clients(app, Connections(), MANY + 1) as opened:
        for _, writer in opened[:-1]:
            writer.write(a_post(CHAT))
        opened[-1][1].write(a_post(HEALTH))
        for reader, _ in opened:
            assert (await reader.readuntil(b"ok")).startswith(b"HTTP/1.1 200")
    assert len(app.paths) == MANY + 1
    assert app.paths.index(HEALTH.decode()) <= 3 * PER_TURN
    assert app.bodies == [b"{}"] * (MANY + 1)


async def test_time_until_the_start_counts_from_the_arrival() -> None:
    app = Recorder()
    async with clients(app, Connections(), MANY) as opened:
        began_s = time.monotonic()
        for _, writer in opened:
            writer.write(a_post(CHAT))
        await eventually(lambda: len(app.paths) == MANY)
    waited = [arrived for arrived in app.arrived if arrived is not None]
    assert app.arrived[0] is None
    assert len(waited) >= MANY - 3 * PER_TURN
    assert all(began_s <= arrived <= time.monotonic() for arrived in waited)


async def test_body_that_arrives_during_the_wait_is_received() -> None:
    app, connections = Recorder(), Connections()
    app.answers.set()
    async with clients(app, connections, MANY) as opened:
        sent = a_post(CHAT, b"a" * 300_000)
        for _, writer in opened[:-1]:
            writer.write(a_post(CHAT))
        opened[-1][1].write(sent[:1000])
        await asyncio.sleep(0)
        opened[-1][1].write(sent[1000:])
        for reader, _ in opened:
            await reader.readuntil(b"ok")
    assert sorted(map(len, app.bodies)) == [2] * (MANY - 1) + [300_000]


async def test_pipelined_requests_are_served_in_order() -> None:
    app = Recorder()
    app.answers.set()
    async with clients(app, Connections(), PER_TURN) as opened:
        for _, writer in opened:
            writer.write(b"".join(a_post(CHAT, b"%d" % number) for number in range(8)))
        for reader, _ in opened:
            for _ in range(8):
                await reader.readuntil(b"ok")
    assert sorted(app.bodies) == sorted([b"%d" % number for number in range(8)] * PER_TURN)


@pytest.mark.parametrize("leaves", [True, False])
async def test_connection_that_is_cut_while_its_request_waits_starts_nothing(leaves: bool) -> None:
    app, connections = Recorder(), Connections()
    async with clients(app, connections, MANY) as opened:
        for _, writer in opened:
            writer.write(a_post(CHAT))
        await eventually(lambda: len(connections.starts) > 0)
        connections.cut_all()
        if leaves:
            for _, writer in opened:
                writer.transport.abort()
        await eventually(lambda: len(connections) == 0)
        assert len(connections.starts) == 0
        with contextlib.suppress(OSError):
            await opened[0][0].read()
    assert len(app.paths) < MANY
