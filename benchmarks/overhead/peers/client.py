"""A load client that costs little CPU time: keep-alive connections that note when the parts of an answer arrive."""

from __future__ import annotations

import asyncio
import contextlib
import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import httptools
import orjson

from benchmarks.overhead.peers.upstream import MODEL, prompt

API_KEY = "sk-benchmark"
CONNECT_S = 10.0
"""Longest time for a connection to open, in seconds."""


_TAIL_BYTES = 1024
"""Bytes of the end of an answer that are kept, for its last event or its error."""


@dataclass(slots=True)
class Answers:
    """Times of the answers to one turn's requests, in seconds. Failed requests are counted and have no times."""

    ttft_s: array[float] = field(default_factory=lambda: array("d"))
    """From the request to the first byte of the body."""
    whole_s: array[float] = field(default_factory=lambda: array("d"))
    """From the request to the end of the answer."""
    itl_s: array[float] = field(default_factory=lambda: array("d"))
    """Between reads that carried events of one stream."""
    failures: int = 0
    errors: dict[str, int] = field(default_factory=dict)
    """Failures by cause."""
    first_bytes: int = 0
    """Streams whose first byte arrived."""

    def fail(self, cause: str) -> None:
        """Count a failure."""
        self.failures += 1
        self.errors[cause] = self.errors.get(cause, 0) + 1


class Requests:
    """Bytes of requests with the same options. Each has a prompt of its own, so that no cache answers it."""

    def __init__(self, tokens: int, stream: bool, pace_ms: float, first: int = 0) -> None:
        self._pace_ms, self._tokens, self._stream, self._number = pace_ms, tokens, stream, first

    def next(self) -> bytes:
        """Return the bytes of the next request."""
        self._number += 1
        body = {
            "model": MODEL,
            "messages": [{"role": "user", "content": prompt(self._pace_ms, self._number)}],
            "max_tokens": self._tokens,
            "stream": self._stream,
            # A real engine then generates all tokens.
            "ignore_eos": True,
        }
        data = orjson.dumps(body)
        return (
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
            b"authorization: Bearer %b\r\nx-slo-ttft-ms: 60000\r\nx-slo-tpot-ms: 5000\r\ncontent-length: %d\r\n\r\n%b"
            % (API_KEY.encode(), len(data), data)
        )


def error_code(body: bytes) -> str:
    """Return the code of an error in OpenAI's format, "" without one."""
    try:
        code = orjson.loads(body)["error"]["code"]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return ""
    return str(code)[:64]


class EventCounter:
    """Counts the SSE events that end in a body which arrives in pieces."""

    __slots__ = ("_carry",)

    def __init__(self) -> None:
        self._carry = b""

    def count(self, piece: bytes) -> int:
        """Return how many events end in ``piece``."""
        piece = self._carry + piece
        self._carry = b"\n" if piece.endswith(b"\n") and not piece.endswith(b"\n\n") else b""
        return piece.count(b"\n\n")


class Connection(asyncio.Protocol):
    """One keep-alive connection. `send` one request at a time and await its end."""

    def __init__(self, answers: Answers) -> None:
        self.answers = answers
        self.closed = False
        self._done: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        # NOTE: uvloop's transports are no subclass of `asyncio.Transport`.
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """Fail the request that is open."""
        self.closed = True
        self._end(f"connection lost: {exc}" if exc else "connection closed")

    def close(self) -> None:
        """Close the connection without counting an open request again."""
        self._done = None
        self._transport.close()

    def send(self, request: bytes, tokens: int, stream: bool) -> asyncio.Future[None]:
        """Send ``request`` and return a future of its end. The answer must have ``tokens`` events if it streams."""
        self._parser = httptools.HttpResponseParser(self)
        self._events, self._counter = 0, EventCounter()
        self._needed, self._stream, self._tail = tokens, stream, b""
        self._first_at = self._last_at = 0.0
        self._done = done = asyncio.get_running_loop().create_future()
        self._sent_at = time.perf_counter()
        if self.closed:
            self._end("connection closed")
        else:
            self._transport.write(request)
        return done

    def data_received(self, data: bytes) -> None:
        """Parse a part of an answer."""
        self._now = time.perf_counter()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._end(f"bad HTTP: {error}")
            self._transport.close()

    def on_body(self, body: bytes) -> None:
        """Note when a part of the body arrived."""
        if not self._first_at:
            self._first_at = self._last_at = self._now
            self.answers.first_bytes += 1
        self._tail = (self._tail + body)[-_TAIL_BYTES:]
        if not self._stream:
            return
        events = self._counter.count(body)
        if events and self._events:
            self.answers.itl_s.append(self._now - self._last_at)
            # NOTE: events that arrive in one read have no time between them, as for a client that reads lines.
            self.answers.itl_s.extend([0.0] * (events - 1))
        if events:
            self._last_at = self._now
        self._events += events

    def on_message_complete(self) -> None:
        """End the request."""
        status = self._parser.get_status_code()
        if status != 200:
            self._end(f"status {status} {error_code(self._tail)}".strip())
        elif self._stream and (b"[DONE]" not in self._tail or self._events < self._needed):
            self._end("incomplete stream")
        else:
            self._end(None)
        if not self._parser.should_keep_alive():
            self._transport.close()

    def _end(self, failure: str | None) -> None:
        if self._done is None or self._done.done():
            return
        if failure is None:
            self.answers.ttft_s.append(self._first_at - self._sent_at)
            self.answers.whole_s.append(self._now - self._sent_at)
        else:
            self.answers.fail(failure)
        self._done.set_result(None)


async def connect(port: int, answers: Answers, count: int) -> list[Connection]:
    """Open up to ``count`` connections to 127.0.0.1:``port``. A connection that does not open counts as a failure."""
    loop = asyncio.get_running_loop()
    connections: list[Connection] = []
    for first in range(0, count, 100):
        opened = await asyncio.gather(
            *(
                asyncio.wait_for(loop.create_connection(lambda: Connection(answers), "127.0.0.1", port), CONNECT_S)
                for _ in range(min(100, count - first))
            ),
            return_exceptions=True,
        )
        for result in opened:
            if isinstance(result, BaseException):
                answers.fail(f"connect: {type(result).__name__}")
            else:
                connections.append(result[1])
    return connections


async def one_after_another(
    connection: Connection, requests: Requests, count: int, until: float, tokens: int, stream: bool
) -> None:
    """Send up to ``count`` requests, each when the one before it ended, until the time ``until`` (perf_counter, s)."""
    for _ in range(count):
        if time.perf_counter() >= until or connection.closed:
            return
        await connection.send(requests.next(), tokens, stream)


async def all_at_once(
    connections: Sequence[Connection], requests: Requests, over_s: float, limit_s: float, tokens: int
) -> None:
    """Send one streamed request on each connection, evenly over ``over_s`` (s), and wait until all have ended.

    After ``limit_s`` (s) the open ones count as failures.
    """
    prepared = [requests.next() for _ in connections]
    start = time.perf_counter()
    open_: list[asyncio.Future[None]] = []
    for number, (connection, request) in enumerate(zip(connections, prepared, strict=True)):
        if over_s:
            wait = start + number * over_s / len(connections) - time.perf_counter()
            if wait > 0:
                await asyncio.sleep(wait)
        open_.append(connection.send(request, tokens, stream=True))
    if not open_:
        return
    left = max(0.1, start + limit_s - time.perf_counter())
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(left):
            await asyncio.wait(open_)
    for connection, future in zip(connections, open_, strict=True):
        if not future.done():
            connection.answers.fail("not finished in time")
            connection.close()
