"""The client of a remote server: whatever the server does, every request ends, and with the error that fits."""

from __future__ import annotations

import asyncio
import gc
import gzip
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from engine_adapter.engine import EngineLost, EngineUnreachable
from engine_adapter.remote.client import Upstream, _Endings, plain_chunks
from engine_adapter.remote.engine import HttpEngine

Script = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n"
WITHIN_S = 5


@asynccontextmanager
async def talking(script: Script, connections: int = 4, read_timeout_s: float = 60.0) -> AsyncIterator[Upstream]:
    """A client of a server that reads a request's head, then does what ``script`` says."""
    over = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.readuntil(b"\r\n\r\n")
            await script(reader, writer)
            await over.wait()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.transport.abort()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    upstream = Upstream("e", f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", connections, 1.0, read_timeout_s)
    yield upstream
    over.set()
    async with asyncio.timeout(WITHIN_S):
        await upstream.close()
    server.close()


def says(*parts: bytes, and_leaves: bool = False) -> Script:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for part in parts:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(0.02)
        if and_leaves:
            writer.transport.abort()

    return script


async def read(upstream: Upstream, content: bytes = b"{}") -> bytes:
    async with asyncio.timeout(WITHIN_S), upstream.answer("POST", b"/x", [], content) as response:
        return b"".join([chunk async for chunk in plain_chunks(response)])


@pytest.mark.parametrize(
    "script",
    [
        says(CHUNKED, b"zz\r\nno chunk"),
        says(CHUNKED, b"5\r\nhe", and_leaves=True),
        says(CHUNKED, and_leaves=True),
        says(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n", b"hell", and_leaves=True),
        says(b"SSH-2.0-Open\r\n"),
        says(and_leaves=True),
        says(b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 5\r\n\r\nhello"),
    ],
    ids=["no chunk", "half a chunk", "no end", "too short", "no HTTP", "nothing", "no gzip"],
)
async def test_an_answer_that_breaks_off_is_a_lost_engine_at_once(script: Script) -> None:
    async with talking(script) as upstream:
        with pytest.raises(EngineLost) as lost:
            await read(upstream)
        assert not isinstance(lost.value, EngineUnreachable), "it may have been sent"


@pytest.mark.parametrize("content", [b"{}", b"x" * 20_000_000], ids=["silent", "does not read"])
async def test_a_server_that_does_nothing_is_given_up(content: bytes) -> None:
    async with talking(says(), read_timeout_s=0.1) as upstream:
        with pytest.raises(EngineLost):
            await read(upstream, content)


@pytest.mark.parametrize("content", [b"{}", b"x" * 20_000_000], ids=["silent", "does not read"])
async def test_closing_ends_whoever_waits_for_an_answer_or_for_a_connection(content: bytes) -> None:
    async with talking(says(), connections=1) as upstream:
        calls = [asyncio.create_task(read(upstream, content)) for _ in range(3)]
        await asyncio.sleep(0.1)
        async with asyncio.timeout(2):
            await upstream.close()
        ends = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(end) for end in ends] == [EngineLost] * 3
        with pytest.raises(EngineLost, match="stopped"):
            await read(upstream)


async def test_who_gives_up_waiting_frees_the_connection_for_the_next() -> None:
    first = asyncio.Event()

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not first.is_set():
            first.set()
            return
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")

    async with talking(script, connections=1) as upstream:
        waits = asyncio.create_task(read(upstream))
        await first.wait()
        waits.cancel()
        assert await read(upstream) == b"ok"
        assert waits.cancelled()


async def test_a_connection_serves_many() -> None:
    connections: list[asyncio.StreamWriter] = []

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(writer)
        for _ in range(5):
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
            await reader.readuntil(b"{}POST /x HTTP/1.1\r\n")

    async with talking(script) as upstream:
        assert [await read(upstream) for _ in range(5)] == [b"ok"] * 5
        assert len(connections) == 1


async def test_the_end_of_a_connection_is_no_unheard_exception_and_kept_once() -> None:
    loop, unheard = asyncio.get_running_loop(), []
    loop.set_exception_handler(lambda _, context: unheard.append(context))
    endings, ended = _Endings(), loop.create_future()
    body = SimpleNamespace(is_eof=lambda: True)
    fake_answer: Any = SimpleNamespace(connection=SimpleNamespace(protocol=SimpleNamespace(closed=ended)), content=body)
    for _ in range(5):
        with endings.heard_by(fake_answer):
            pass
    assert len(ended._callbacks) == 1, "one, however many answers"
    ended.set_exception(ConnectionResetError())
    await asyncio.sleep(0)
    del ended, fake_answer
    gc.collect()
    assert unheard == []


async def test_nobody_there_is_unreachable() -> None:
    upstream = Upstream("e", "http://127.0.0.1:9", 4, 1.0, 1.0)
    with pytest.raises(EngineUnreachable, match="engine e at "):
        await read(upstream)
    await upstream.close()


@pytest.mark.parametrize("encoding", ["gzip", "x-gzip", "deflate", "br"])
async def test_what_can_be_decoded_is(encoding: str) -> None:
    import zlib

    packed = {"deflate": zlib.compress(b"hello"), "br": b"not ours to read"}.get(encoding, gzip.compress(b"hello"))
    head = f"HTTP/1.1 200 OK\r\nContent-Encoding: {encoding}\r\nContent-Length: {len(packed)}\r\n\r\n".encode()
    async with talking(says(head + packed[:7], packed[7:])) as upstream:
        assert await read(upstream) == (packed if encoding == "br" else b"hello")


@pytest.mark.parametrize("scheme", ["https", "HTTPS"])
async def test_no_spelling_of_https_goes_without_a_certificate(scheme: str) -> None:
    upstream = Upstream("e", f"{scheme}://127.0.0.1:9", 4, 1.0, 1.0)
    session = upstream._open()
    assert session.connector._ssl.verify_mode.name == "CERT_REQUIRED"  # type: ignore[union-attr]
    await session.close()


def test_a_base_url_holds_no_secret() -> None:
    with pytest.raises(ValueError, match="api_key") as told:
        HttpEngine("remote", "http://user:secret@host:8000")
    assert "secret" not in str(told.value)
