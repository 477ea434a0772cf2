"""The HTTP client of a remote engine: every request ends, and with the right error."""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from engine_adapter.engine import EngineLost, EngineUnreachable
from engine_adapter.remote import client
from engine_adapter.remote import response as response_module
from engine_adapter.remote.client import Upstream
from engine_adapter.remote.engine import HttpEngine

Script = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
TEST_TIMEOUT_S = 30


@asynccontextmanager
async def upstream_of(
    script: Script, read_timeout_s: float = 60.0, connect_timeout_s: float = 1.0
) -> AsyncIterator[Upstream]:
    """An `Upstream` whose server reads a request's head, then runs ``script``."""
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
    upstream = Upstream(
        "e", f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", connect_timeout_s, read_timeout_s
    )
    yield upstream
    over.set()
    async with asyncio.timeout(TEST_TIMEOUT_S):
        await upstream.close()
    server.close()


async def respond(times: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *parts: bytes) -> None:
    """Send ``parts``, 5 ms apart, to each of the next requests of a connection."""
    for _ in range(times):
        writer.write(parts[0])
        for part in parts[1:]:
            await asyncio.sleep(0.005)
            writer.write(part)
        await reader.readuntil(b"{}POST /x HTTP/1.1\r\n")


def sends(*parts: bytes, then_aborts: bool = False) -> Script:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for part in parts:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(0.02)
        if then_aborts:
            writer.transport.abort()

    return script


async def read(upstream: Upstream, content: bytes = b"{}") -> bytes:
    async with asyncio.timeout(TEST_TIMEOUT_S):
        with await upstream.send("POST", b"/x", [], content) as response:
            parts = []
            read = response.plain_reader()
            while part := await read():
                parts.append(part)
            return b"".join(parts)


@pytest.mark.parametrize(
    "interim", [b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"]
)
async def test_interim_response_is_skipped(interim: bytes) -> None:
    async with upstream_of(sends(interim, interim, CHUNKED, b"0\r\n\r\n")) as upstream:
        assert await read(upstream) == b"hello"


@pytest.mark.parametrize(
    "script",
    [
        sends(CHUNKED, b"zz\r\nno chunk"),
        sends(CHUNKED, b"5\r\nhe", then_aborts=True),
        sends(CHUNKED, then_aborts=True),
        sends(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n", b"hell", then_aborts=True),
        sends(b"SSH-2.0-Open\r\n"),
        sends(then_aborts=True),
        sends(b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 5\r\n\r\nhello"),
    ],
    ids=["bad chunk", "partial chunk", "no last chunk", "too short", "not HTTP", "no response", "not gzip"],
)
async def test_upstream_raises_engine_lost_for_a_broken_response(script: Script) -> None:
    async with upstream_of(script) as upstream:
        with pytest.raises(EngineLost) as lost:
            await read(upstream)
        assert not isinstance(lost.value, EngineUnreachable), "the request may have been sent"


@pytest.mark.parametrize("broken", [CHUNKED + b"secret\r\n", b"HTTP/1.1 secret\r\n\r\n", b"secret: secret\r\n\r\n"])
async def test_error_does_not_quote_the_response(broken: bytes) -> None:
    async with upstream_of(sends(broken)) as upstream:
        with pytest.raises(EngineLost) as lost:
            await read(upstream)
        assert "Error" in str(lost.value) or "Message" in str(lost.value)
        assert "secret" not in str(lost.value)


@pytest.mark.parametrize("content", [b"{}", b"x" * 20_000_000], ids=["small request", "unread request"])
async def test_upstream_gives_up_on_a_silent_server(content: bytes) -> None:
    async with upstream_of(sends(), read_timeout_s=0.1, connect_timeout_s=0.2) as upstream:
        with pytest.raises(EngineLost):
            await read(upstream, content)


@pytest.mark.parametrize("content", [b"{}", b"x" * 20_000_000], ids=["small request", "unread request"])
async def test_close_ends_requests_that_wait_for_a_response_or_connection(content: bytes) -> None:
    async with upstream_of(sends()) as upstream:
        calls = [asyncio.create_task(read(upstream, content)) for _ in range(3)]
        await asyncio.sleep(0.1)
        async with asyncio.timeout(TEST_TIMEOUT_S):
            await upstream.close()
        ends = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(end) for end in ends] == [EngineLost] * 3
        with pytest.raises(EngineLost, match="stopped"):
            await read(upstream)


async def test_cancelled_request_frees_its_connection() -> None:
    first = asyncio.Event()

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not first.is_set():
            first.set()
            return
        writer.write(OK)

    async with upstream_of(script) as upstream:
        waiting = asyncio.create_task(read(upstream))
        await first.wait()
        waiting.cancel()
        assert await read(upstream) == b"ok"
        assert waiting.cancelled()


async def test_upstream_reuses_connections() -> None:
    connections: list[asyncio.StreamWriter] = []

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(writer)
        await respond(5, reader, writer, OK)

    async with upstream_of(script) as upstream:
        assert [await read(upstream) for _ in range(5)] == [b"ok"] * 5
        assert len(connections) == 1


@pytest.mark.parametrize(
    ("closes_after_s", "answers_again", "lost"),
    [(0.0, True, False), (0.0, False, True), (0.3, True, True)],
    ids=["sent again", "sent again only once", "not sent again after a while"],
)
async def test_request_on_a_connection_that_the_server_closes_meanwhile_is_sent_again(
    monkeypatch: pytest.MonkeyPatch, closes_after_s: float, answers_again: bool, lost: bool
) -> None:
    """A server that closes an idle connection has not seen the request, and cannot say so."""
    monkeypatch.setattr(response_module, "_AT_ONCE_S", 0.05 if closes_after_s else TEST_TIMEOUT_S)
    connections: list[asyncio.StreamWriter] = []

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(writer)
        if len(connections) == 1:
            writer.write(OK)
            await reader.readuntil(b"{}POST /x HTTP/1.1\r\n")
            await asyncio.sleep(closes_after_s)
        elif answers_again:
            writer.write(OK)
            return
        writer.close()

    async with upstream_of(script) as upstream:
        assert await read(upstream) == b"ok"
        if lost:
            with pytest.raises(EngineLost, match="closed before the response was complete"):
                await read(upstream)
        else:
            assert await read(upstream) == b"ok"
        assert len(connections) == (1 if closes_after_s else 2)


async def test_upstream_raises_engine_unreachable_without_a_server() -> None:
    upstream = Upstream("e", "http://127.0.0.1:9", 1.0, 1.0)
    with pytest.raises(EngineUnreachable, match="engine e at "):
        await read(upstream)
    await upstream.close()


@pytest.mark.parametrize("encoding", ["gzip", "x-gzip", "deflate", "br"])
async def test_plain_chunks_decodes_known_encodings(encoding: str) -> None:
    import zlib

    packed = {"deflate": zlib.compress(b"hello"), "br": b"passed through"}.get(encoding, gzip.compress(b"hello"))
    head = f"HTTP/1.1 200 OK\r\nContent-Encoding: {encoding}\r\nContent-Length: {len(packed)}\r\n\r\n".encode()
    async with upstream_of(sends(head + packed[:7], packed[7:])) as upstream:
        assert await read(upstream) == (packed if encoding == "br" else b"hello")


def test_base_url_with_credentials_is_rejected() -> None:
    with pytest.raises(ValueError, match="api_key") as raised:
        HttpEngine("remote", "http://user:secret@host:8000")
    assert "secret" not in str(raised.value)


# --- what the client must not mix up ----------------------------------------------------------------------------------


async def test_body_without_length_ends_with_the_connection() -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.0 200 OK\r\n\r\nhello")
        await writer.drain()
        writer.close()

    async with upstream_of(script) as upstream:
        assert await read(upstream) == b"hello"


async def test_broken_connection_delivers_what_arrived_before() -> None:
    async with upstream_of(sends(CHUNKED, then_aborts=True)) as upstream:
        with await upstream.send("POST", b"/x", [], b"{}") as response:
            await asyncio.sleep(0.1)
            assert await response.read() == b"hello"
            with pytest.raises(EngineLost):
                await response.read()


async def test_head_response_has_no_body() -> None:
    async with upstream_of(sends(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n")) as upstream:
        with await upstream.send("HEAD", b"/x", [], b"") as response:
            assert (response.status, await response.read()) == (200, b"")


@pytest.mark.parametrize("status", [204, 304])
async def test_status_without_body_is_complete_at_its_head(status: int) -> None:
    async with upstream_of(sends(b"HTTP/1.1 %d X\r\n\r\n" % status)) as upstream:
        assert await read(upstream) == b""


@pytest.mark.parametrize(
    "extra", [b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil", b"HTTP/1.1 200 OK\r\nContent-Le", b"junk"]
)
@pytest.mark.parametrize("pause_s", [0.0, 0.05])
async def test_bytes_after_a_response_never_answer_the_next_request(extra: bytes, pause_s: float) -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(OK + (b"" if pause_s else extra))
        await asyncio.sleep(pause_s)
        if pause_s:
            writer.write(extra)

    async with upstream_of(script) as upstream:
        assert await read(upstream) == b"ok"
        await asyncio.sleep(0.1)
        assert await read(upstream) == b"ok"


@pytest.mark.parametrize("head", [b"x: " + b"a" * 300_000, b"x: y\r\n" * 60_000], ids=["long header", "many headers"])
async def test_head_of_a_response_is_bounded(head: bytes) -> None:
    async with upstream_of(sends(b"HTTP/1.1 200 OK\r\n" + head)) as upstream:
        with pytest.raises(EngineLost):
            await read(upstream)


async def test_unread_body_makes_the_server_wait() -> None:
    written = 0

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal written
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 80000000\r\n\r\n")
        for _ in range(800):
            writer.write(b"x" * 100_000)
            await writer.drain()
            written += 100_000

    async with upstream_of(script) as upstream:
        with await upstream.send("POST", b"/x", [], b"{}") as response:
            await asyncio.sleep(0.3)
            assert written < 40_000_000, "the sockets hold some of it"
            size = 0
            while data := await response.read():
                size += len(data)
            assert size == 80_000_000


async def test_slow_reader_is_no_silent_server() -> None:
    async with upstream_of(sends(CHUNKED, b"0\r\n\r\n"), read_timeout_s=0.1) as upstream:
        with await upstream.send("POST", b"/x", [], b"{}") as response:
            await asyncio.sleep(0.4)
            assert await response.read() == b"hello"


async def test_server_that_goes_silent_in_its_body_is_lost() -> None:
    async with upstream_of(sends(CHUNKED), read_timeout_s=0.1) as upstream:
        with await upstream.send("POST", b"/x", [], b"{}") as response:
            assert await response.read() == b"hello"
            with pytest.raises(EngineLost, match="no data"):
                async with asyncio.timeout(TEST_TIMEOUT_S):
                    await response.read()


async def test_last_bytes_have_a_moment_to_arrive() -> None:
    """The connection is used again if the response ends in time, and closed otherwise."""
    connections: list[asyncio.StreamWriter] = []

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(writer)
        await respond(2, reader, writer, CHUNKED, b"0\r\n\r\n")
        writer.write(CHUNKED)

    async with upstream_of(script) as upstream:
        for _ in range(4):
            with await upstream.send("POST", b"/x", [], b"{}") as response:
                assert await response.read() == b"hello"
                response.close_after_last_bytes()
            await asyncio.sleep(0.1)
    assert len(connections) == 2


async def test_idle_connection_is_closed_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "IDLE_CONNECTION_S", 0.05)
    closed = asyncio.Event()

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(OK)
        await reader.read()
        closed.set()

    async with upstream_of(script) as upstream:
        assert await read(upstream) == b"ok"
        async with asyncio.timeout(TEST_TIMEOUT_S):
            await closed.wait()


async def test_end_requests_gives_its_reason() -> None:
    async with upstream_of(sends()) as upstream:
        call = asyncio.create_task(read(upstream))
        await asyncio.sleep(0.05)
        assert upstream.end_requests("it is down") == 1
        with pytest.raises(EngineLost, match="it is down"):
            await call


@pytest.mark.parametrize("value", [b"a\r\nx: y", b"a\nx: y", b"a\rx: y"])
async def test_header_cannot_become_two(value: bytes) -> None:
    async with upstream_of(sends(CHUNKED, b"0\r\n\r\n")) as upstream:
        with pytest.raises(ValueError, match="line break"):
            await upstream.send("POST", b"/x", [(b"a", value)], b"{}")


@pytest.mark.parametrize(
    ("path", "sent"), [(b"/a b", b"/a%20b"), (b"/\xc3\xa4?q=%20", b"/%C3%A4?q=%20"), (b"x\r\ny: z", b"/x%0D%0Ay:%20z")]
)
async def test_path_is_one_token(path: bytes, sent: bytes) -> None:
    lines: list[bytes] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        lines.append(await reader.readline())
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok")
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    upstream = Upstream("e", f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/base", 1.0, 5.0)
    with await upstream.send("GET", path, [], b"") as response:
        assert await response.read() == b"ok"
    await upstream.close()
    server.close()
    assert lines == [b"GET /base" + sent + b" HTTP/1.1\r\n"]
