"""What an abuser does to a gateway over HTTP. Each kind runs for some seconds and returns what the abuser saw.

python -m benchmarks.isolation.http_abuse KIND PORT KEY SECONDS
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

CHAT, EMBEDDINGS = "/v1/chat/completions", "/v1/embeddings"
FLOOD_PER_S = 160.0
"""Requests per second: 20 times the victim's."""

OTHER_ADDRESS = "127.0.0.2"
"""The abuser's own address, where the system has one."""

_SMALL_BUFFER, _SMALL_SEGMENTS = 4096, 536


@dataclass(slots=True)
class Abuser:
    """Where the abuser connects, with which key, and what it saw: statuses, and ``closed`` for no answer."""

    port: int
    key: str = ""
    address: str = OTHER_ADDRESS
    seen: Counter[str] = field(default_factory=Counter)
    random: random.Random = field(default_factory=lambda: random.Random(0))

    def head(self, path: str, framing: str) -> bytes:
        """Return a request head."""
        key = f"authorization: Bearer {self.key}\r\n" if self.key else ""
        return f"POST {path} HTTP/1.1\r\nhost: x\r\n{key}content-type: application/json\r\n{framing}\r\n\r\n".encode()

    def request(self, path: str, slo_class: str = "chat", **body: object) -> bytes:
        """Return a request."""
        content = json.dumps(body).encode()
        headers = f"x-slo-class: {slo_class}\r\nconnection: close\r\ncontent-length: {len(content)}"
        return self.head(path, headers) + content

    def chat(self, tokens: int, slo_class: str = "chat", **fields: object) -> bytes:
        """Return a chat request whose answer has ``tokens`` tokens."""
        document = {"model": "simulated", "messages": [{"role": "user", "content": "x"}], "ignore_eos": True, **fields}
        return self.request(CHAT, slo_class, max_tokens=tokens, **document)

    @asynccontextmanager
    async def connected(self, stalls: bool = False) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        """Connect.

        ``stalls``: with a small receive buffer and small segments, which keep the server's send buffer small.
        """
        client = socket.socket()
        if stalls:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SMALL_BUFFER)
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, _SMALL_SEGMENTS)
        with contextlib.suppress(OSError):
            client.bind((self.address, 0))
        client.setblocking(False)
        try:
            await asyncio.get_running_loop().sock_connect(client, ("127.0.0.1", self.port))
            reader, writer = await asyncio.open_connection(sock=client, limit=1 << 16)
        except BaseException:
            client.close()
            raise
        if stalls:
            writer.transport.pause_reading()  # type: ignore[attr-defined]
        try:
            yield reader, writer
        finally:
            writer.transport.abort()

    async def ask(self, request: bytes) -> str:
        """Send ``request``, read the whole answer and return its status; "closed" without one."""
        try:
            async with self.connected() as (reader, writer):
                writer.write(request)
                answer = await reader.read(64)
                while await reader.read(1 << 16):
                    pass
        except OSError:
            answer = b""
        status = answer[9:12].decode() or "closed"
        self.seen[status] += 1
        return status


async def _at_rate(per_s: float, one: Callable[[], Awaitable[object]]) -> None:
    """Call ``one`` at a rate, until cancelled."""
    async with asyncio.TaskGroup() as group:
        started = time.monotonic()
        number = 0
        while True:
            number += 1
            group.create_task(_ignoring_errors(one()))
            await asyncio.sleep(max(0.0, started + number / per_s - time.monotonic()))


async def _all(count: int, one: Callable[[], Awaitable[object]]) -> None:
    """Call ``one`` again and again, ``count`` at a time, until cancelled."""

    async def repeat() -> None:
        while True:
            await _ignoring_errors(one())
            await asyncio.sleep(0.05)

    async with asyncio.TaskGroup() as group:
        for _ in range(count):
            group.create_task(repeat())
            # The first ones do not arrive all at once.
            await asyncio.sleep(0.005)


async def _ignoring_errors(one: Awaitable[object]) -> None:
    with contextlib.suppress(OSError, asyncio.IncompleteReadError):
        await one


async def _stall(abuser: Abuser, request: bytes, hold_s: float) -> None:
    async with abuser.connected(stalls=True) as (_, writer):
        writer.write(request)
        abuser.seen["unread"] += 1
        await asyncio.sleep(hold_s)


async def _half_body(abuser: Abuser, path: str, first: bytes, drop: bytes, every_s: float, framing: str) -> None:
    """Send a part of a body, and then a drop at a time until the gateway answers or cuts the connection."""
    async with abuser.connected() as (reader, writer):
        writer.write(abuser.head(path, framing) + first)
        answering = asyncio.create_task(reader.read(64))
        try:
            while not answering.done():
                await writer.drain()
                writer.write(drop)
                await asyncio.wait({answering}, timeout=every_s)
            abuser.seen[answering.result()[9:12].decode() or "closed"] += 1
        except ConnectionError:
            abuser.seen["closed"] += 1
        finally:
            answering.cancel()
    await asyncio.sleep(1)


async def _silent(abuser: Abuser) -> None:
    async with abuser.connected() as (reader, _):
        abuser.seen["opened"] += 1
        await reader.read(64)


DECLARED_8_MIB = f"content-length: {8 << 20}"


async def stalled_16(abuser: Abuser) -> None:
    """16 stalled readers with four sequences each, as many as the engine has slots."""
    await _all(16, lambda: _stall(abuser, abuser.chat(400, n=4, stream=True, slo_class="free"), 15))


async def stalled_500(abuser: Abuser) -> None:
    """500 stalled readers of streams."""
    await _all(500, lambda: _stall(abuser, abuser.chat(600, stream=True, slo_class="free"), 60))


async def stalled_embeddings(abuser: Abuser) -> None:
    """500 stalled readers of embeddings, 256 KB each."""
    await _all(500, lambda: _stall(abuser, abuser.request(EMBEDDINGS, input="x", dimensions=64_000), 60))


async def pass_through(abuser: Abuser) -> None:
    """A flood of calls to a route that is not scheduled."""
    await _at_rate(FLOOD_PER_S, lambda: abuser.ask(abuser.request(EMBEDDINGS, input="x")))


async def slow_bodies(abuser: Abuser) -> None:
    """100 bodies of 8 MiB, the first half sent at once, then a KiB at a time."""
    first, drop = b'"' + b" " * (4 << 20), b" " * 1024
    await _all(100, lambda: _half_body(abuser, EMBEDDINGS, first, drop, 0.1, DECLARED_8_MIB))


async def huge_bodies(abuser: Abuser) -> None:
    """Complete bodies of 8 MB, ten per second."""
    request = abuser.chat(10, unused="x" * 7_900_000)
    await _at_rate(10, lambda: abuser.ask(request))


async def flood(abuser: Abuser) -> None:
    """A flood of chats."""
    await _at_rate(FLOOD_PER_S, lambda: abuser.ask(abuser.chat(100, stream=True)))


async def silent_connections(abuser: Abuser) -> None:
    """Connections without a byte, 300 per second."""
    await _at_rate(300, lambda: _silent(abuser))


async def busy_connections(abuser: Abuser) -> None:
    """1,000 connections with half a body each."""
    await _all(1000, lambda: _half_body(abuser, CHAT, b"{", b" ", 1.0, "content-length: 60000"))


ABUSES: dict[str, Callable[[Abuser], Awaitable[None]]] = {
    one.__name__: one
    for one in (
        stalled_16, stalled_500, stalled_embeddings, flood, pass_through, slow_bodies, huge_bodies, silent_connections,
        busy_connections,
    )
}  # fmt: skip


async def run_abuse(kind: str, abuser: Abuser, seconds: float) -> Counter[str]:
    """Run the abuse ``kind`` for ``seconds`` and return what the abuser saw."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await ABUSES[kind](abuser)
    return abuser.seen


if __name__ == "__main__":
    kind_, port_, key_, seconds_ = sys.argv[1:]
    print(json.dumps(asyncio.run(run_abuse(kind_, Abuser(int(port_), key_), float(seconds_)))))
