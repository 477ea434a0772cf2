"""Connections of an `HttpEngine`: limits, redirects and headers."""

from __future__ import annotations

import asyncio
import resource
from typing import Any

import pytest

from engine_adapter.engine import EngineLost, Receive, Scope, Send
from engine_adapter.remote.engine import HttpEngine
from gateway.config.engines import HttpEngineConfig
from tests.fixtures.live_server import HANG_S, eventually, serve
from tests.fixtures.scripted_server import CHAT, DONE, Scripted, ScriptedStream, ask, chunk, post, proxied

pytestmark = pytest.mark.process

LONG_RESPONSE_S = 30.0


# --- connection limits ------------------------------------------------------------------------------------------------


async def test_as_many_streams_as_sequences_run_at_once() -> None:
    """1,500 streams with 2,048 sequences are 1,500 upstream connections."""
    streams = 1500
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 3 * streams:
        if hard < 3 * streams:
            pytest.skip("too few file descriptors")
        resource.setrlimit(resource.RLIMIT_NOFILE, (3 * streams, hard))
    open_streams, release = 0, asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal open_streams
        await reader.readuntil(b"\r\n\r\n")
        open_streams += 1
        await release.wait()
        data = chunk("a", "stop") + DONE
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: %d\r\n\r\n" % len(data))
        writer.write(data)
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0, backlog=4096)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    # A loaded machine takes seconds to accept all connections.
    engine = HttpEngine("remote", url, max_num_seqs=2048, connect_timeout_s=HANG_S)
    done = 0

    async def stream() -> None:
        nonlocal done
        scope = {"type": "http", "method": "POST", "path": CHAT, "query_string": b"", "headers": []}
        messages = [{"type": "http.request", "body": b'{"stream": true}'}]

        async def receive() -> Any:
            return messages.pop() if messages else await asyncio.Event().wait()

        async def send(message: Any) -> None: ...

        await engine.app(scope, receive, send)
        done += 1

    calls = [asyncio.create_task(stream()) for _ in range(streams)]
    await eventually(lambda: open_streams == streams)
    assert (engine.state.engine_running, engine.state.engine_waiting) == (streams, 0)
    release.set()
    await asyncio.gather(*calls)
    assert done == streams
    await engine.stop()
    server.close()


@pytest.mark.parametrize(
    ("options", "sequences"),
    [
        ({"max_num_seqs": 2048}, 2048),
        ({"max_num_seqs": 300, "max_connections": 4000}, 300),
        ({"max_num_seqs": 300, "max_connections": 100}, 99),
        ({"max_num_seqs": 300, "max_connections": 300}, 299),
        ({"max_num_seqs": 300, "max_connections": 301}, 300),
        ({"max_connections": 2}, 1),
    ],
)
def test_policies_see_no_more_sequences_than_connections(options: dict[str, int], sequences: int) -> None:
    assert HttpEngine("remote", "http://127.0.0.1:9", **options).state.max_num_seqs == sequences


def test_max_connections_is_a_setting() -> None:
    config = HttpEngineConfig(kind="http", base_url="http://h:1")
    assert config.max_connections is None
    assert HttpEngineConfig(kind="http", base_url="http://h:1", max_connections=50).max_connections == 50
    with pytest.raises(ValueError, match="max_connections"):
        HttpEngineConfig(kind="http", base_url="http://h:1", max_connections=1)


async def test_waiting_requests_do_not_count_as_running_and_are_freed() -> None:
    async with proxied(ScriptedStream([chunk("a"), LONG_RESPONSE_S]), max_connections=3) as (engine, _):
        calls = [asyncio.create_task(post(engine, stream=True)) for _ in range(5)]
        await eventually(lambda: engine.state.engine_waiting == 3)
        assert engine.state.engine_running == 2
        for call in calls[2:]:
            call.cancel()
        await eventually(lambda: engine.state.engine_waiting == 0)
        for call in calls[:2]:
            call.cancel()
        await eventually(lambda: engine.state.engine_running == 0)
        await asyncio.gather(*calls, return_exceptions=True)


async def test_pass_through_requests_leave_connections_to_scheduled_ones() -> None:
    stuck = asyncio.Event()

    async def slow_embeddings(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        if scope["path"] == "/v1/embeddings":
            await stuck.wait()
        kind, data = (b"text/event-stream", chunk("a", "stop") + DONE) if scope["path"] == CHAT else (b"", b"{}")
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind)]})
        await send({"type": "http.response.body", "body": data})

    async with proxied(slow_embeddings, max_num_seqs=2, max_connections=4) as (engine, _):
        calls = [asyncio.create_task(post(engine, "/v1/embeddings")) for _ in range(6)]
        await eventually(lambda: engine.state.engine_waiting == 4)
        assert (await asyncio.wait_for(post(engine), 30)).status_code == 200
        stuck.set()
        assert [answer.status_code for answer in await asyncio.gather(*calls)] == [200] * 6
        assert (engine.state.engine_running, engine.state.engine_waiting) == (0, 0)


async def test_request_does_not_wait_forever_for_a_connection() -> None:
    async with serve(ScriptedStream([chunk("a"), LONG_RESPONSE_S])) as url:
        engine = HttpEngine("remote", url, max_connections=2, connect_timeout_s=0.2, read_timeout_s=0.3)
        first = asyncio.create_task(post(engine, stream=True))
        await eventually(lambda: engine.state.engine_running == 1)
        with pytest.raises(EngineLost):
            await asyncio.wait_for(post(engine, stream=True), LONG_RESPONSE_S / 2)
        await asyncio.gather(first, return_exceptions=True)
        await engine.stop()


# --- redirects and headers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("path", [CHAT, "/v1/embeddings", "/v1/messages"])
@pytest.mark.parametrize("stream", [True, False])
async def test_redirect_is_a_502_without_its_location(status: int, path: str, stream: bool) -> None:
    async def redirecting(scope: Scope, receive: Receive, send: Send) -> None:
        location = (b"location", b"http://10.0.0.7:8000/internal")
        await send({"type": "http.response.start", "status": status, "headers": [location]})
        await send({"type": "http.response.body", "body": b"see http://10.0.0.7"})

    async with proxied(redirecting) as (_, client):
        response = await client.post(path, json=ask(stream=stream))
    assert response.status_code == 502
    assert "engine remote" in response.text
    assert "10.0.0.7" not in response.text + str(response.headers)


async def test_not_modified_is_no_redirect() -> None:
    async with proxied(Scripted(lambda _: (304, b"", b""))) as (_, client):
        assert (await client.get("/v1/files/x")).status_code == 304


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", [CHAT, "/v1/embeddings", "/v1/responses"])
async def test_date_and_server_of_the_upstream_are_dropped(path: str, stream: bool) -> None:
    """The server in front sets its own ``date``. The one of this test sets neither."""

    async def dated(scope: Scope, receive: Receive, send: Send) -> None:
        kind, data = (b"text/event-stream", chunk("a", "stop") + DONE) if path == CHAT else (b"", b"{}")
        headers = [(b"Date", b"yesterday"), (b"Server", b"nginx"), (b"content-type", kind), (b"x-other", b"1")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": data})

    async with proxied(dated) as (_, client):
        headers = (await client.post(path, json=ask(stream=stream))).headers
    assert headers["x-other"] == "1"
    assert not {"date", "server"} & set(headers)
