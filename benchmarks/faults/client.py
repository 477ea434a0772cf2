"""A client that sends any bytes, well-formed or not, and says how the gateway answered them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket
import struct
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any

import httptools

CHAT = "/v1/chat/completions"
MAX_KEPT = 1 << 20
"""Bytes of a response that are kept, to find an error at its end."""

CLOSED, NO_ANSWER, BROKEN, HUNG_UP = "closed", "no answer", "broken response", "hung up"
"""Ends without a whole response: the gateway closed the connection, it answered nothing in time, it closed within the
response, or the client itself disconnected."""

Part = bytes | float


@dataclass(slots=True)
class Reply:
    """A response, or why there is none. ``end`` is a status, a status with the error's code, or one of the above."""

    status: int = 0
    body: bytes = b""
    end: str = NO_ANSWER

    @property
    def is_complete(self) -> bool:
        """Whether the request was served to its end."""
        return self.end == "200"


@dataclass(slots=True)
class _Reader:
    """Collects one response. Its methods are the callbacks of `httptools.HttpResponseParser`."""

    body: bytearray = field(default_factory=bytearray)
    status: int = 0
    complete: bool = False
    parser: Any = None

    def __post_init__(self) -> None:
        self.parser = httptools.HttpResponseParser(self)

    def on_body(self, data: bytes) -> None:
        if len(self.body) < MAX_KEPT:
            self.body += data
        else:
            self.body[-len(data) :] = data

    def on_headers_complete(self) -> None:
        self.status = self.parser.get_status_code()

    def on_message_complete(self) -> None:
        # 100 Continue is followed by the response.
        self.complete = self.status >= 200


def request(path: str, body: bytes, headers: Mapping[str, str] | None = None, method: str = "POST") -> bytes:
    """Return one well-formed request, after which the gateway closes the connection."""
    lines = [f"{method} {path} HTTP/1.1", "host: gateway", "content-type: application/json", "connection: close"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    return "\r\n".join([*lines, f"content-length: {len(body)}", "", ""]).encode("latin-1") + body


def chat(text: str = "tell me a story", headers: Mapping[str, str] | None = None, **fields: Any) -> bytes:
    """Return the request for a chat."""
    document = {"model": "simulated", "messages": [{"role": "user", "content": text}], **fields}
    return request(CHAT, json.dumps(document).encode(), headers)


async def exchange(
    port: int,
    *parts: Part,
    limit_s: float = 30.0,
    hang_up_at: int | None = None,
    reset: bool = False,
    connecting: AbstractAsyncContextManager[Any] | None = None,
) -> Reply:
    """Send ``parts`` (bytes, or seconds to wait) on a new connection and return the first response.

    ``hang_up_at``: disconnect after so many bytes of the response; 0 disconnects once everything is sent.
    ``reset``: with a reset, as of a process that dies. ``connecting``: entered while the connection is opened.
    """
    try:
        async with connecting or contextlib.nullcontext(), asyncio.timeout(limit_s):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
    except (OSError, TimeoutError):
        return Reply(end=CLOSED)
    sending = asyncio.create_task(_send(writer, parts))
    try:
        async with asyncio.timeout(limit_s):
            if hang_up_at == 0:
                await sending
                return Reply(end=HUNG_UP)
            return await _receive(reader, hang_up_at)
    except TimeoutError:
        return Reply(end=NO_ANSWER)
    finally:
        sending.cancel()
        if reset:
            linger = struct.pack("ii", 1, 0)
            with contextlib.suppress(OSError):
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        writer.transport.abort() if reset else writer.close()
        await asyncio.gather(sending, return_exceptions=True)
        # NOTE: the descriptor is free only once the transport has closed.
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(1):
                await writer.wait_closed()


async def _send(writer: asyncio.StreamWriter, parts: tuple[Part, ...]) -> None:
    with contextlib.suppress(OSError):
        for part in parts:
            if isinstance(part, bytes):
                writer.write(part)
                await writer.drain()
            else:
                await asyncio.sleep(part)


async def _receive(reader: asyncio.StreamReader, hang_up_at: int | None) -> Reply:
    collected, received = _Reader(), 0
    while not collected.complete:
        try:
            data = await reader.read(65536)
        except OSError:
            data = b""
        if not data:
            end = BROKEN if collected.status >= 200 else CLOSED
            return Reply(collected.status, bytes(collected.body), end)
        try:
            collected.parser.feed_data(data)
        except httptools.HttpParserError:
            return Reply(collected.status, bytes(collected.body), BROKEN)
        received += len(data)
        if hang_up_at is not None and received >= hang_up_at:
            return Reply(end=HUNG_UP)
    body = bytes(collected.body)
    return Reply(collected.status, body, end_of(collected.status, body))


def end_of(status: int, body: bytes) -> str:
    """Return how a whole response ended: its status, and the code of its error, also of one within a stream."""
    found = re.search(rb'"code": ?"?(\w+)', body) if b'"error"' in body[-4096:] or status >= 400 else None
    code = found[1].decode() if found else ""
    if status >= 400:
        return f"{status} {code}".strip()
    if found is not None:
        return f"{status}, then {code}"
    return str(status)
