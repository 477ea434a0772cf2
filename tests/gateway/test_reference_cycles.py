"""What a connection leaves behind is freed at once, not by the next full garbage collection."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Iterator

import httpx
import pytest

from engine_adapter.remote.connection import Connection
from engine_adapter.remote.response import Response
from gateway.api.call import Call
from gateway.api.http_protocol import HttpProtocol
from gateway.api.http_request import HttpRequest
from tests.fixtures.live_gateway import chat, live
from tests.fixtures.live_server import eventually
from tests.fixtures.scripted_server import CHAT, DONE, ScriptedStream, ask, chunk, proxied


@pytest.fixture
def no_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def objects_of(*classes: type) -> list[object]:
    return [each for each in gc.get_objects() if isinstance(each, classes)]


@pytest.mark.parametrize("stream", [False, True])
async def test_closed_connections_of_clients_are_freed(no_collection: None, stream: bool) -> None:
    async with live() as antares:
        for _ in range(5):
            async with httpx.AsyncClient(base_url=antares.url, verify=False) as http:
                assert (await http.post(CHAT, json=chat(stream=stream))).status_code == 200
                assert (await http.post(CHAT, json={"messages": 1})).status_code == 400
        # The simulated engine remembers who observed its last request.
        await eventually(lambda: len(objects_of(HttpProtocol)) <= 1)
        await eventually(lambda: len(objects_of(HttpRequest, Call)) <= 2)


async def test_clients_that_leave_are_freed(no_collection: None) -> None:
    async with live() as antares:
        for sent in (
            b"",
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\n",
            b"GET / HTTP/1.1\r\nhost: a\r\n\r\n",
            b"?",
        ):
            _, writer = await asyncio.open_connection("127.0.0.1", int(antares.url.rsplit(":", 1)[1]))
            writer.write(sent)
            await asyncio.sleep(0.05)
            writer.transport.abort()
        await eventually(lambda: objects_of(HttpProtocol) == [])


async def test_connections_to_servers_are_freed(no_collection: None) -> None:
    async with proxied(ScriptedStream((chunk("a"), chunk("", "stop"), DONE))) as (engine, client):
        for _ in range(5):
            await client.post(CHAT, json=ask(stream=True))
        await engine.stop()
        await eventually(lambda: objects_of(Connection, Response) == [])
