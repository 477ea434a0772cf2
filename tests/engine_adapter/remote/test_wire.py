"""Bytes that an `HttpEngine` sends and forwards: paths, headers and bodies, without credentials."""

from __future__ import annotations

import asyncio
import gzip
from typing import Any

import httpx
import orjson
import pytest

from engine_adapter.engine import ASGIApp, Receive, Scope, Send
from engine_adapter.remote.engine import HttpEngine
from tests.fixtures.live_server import Recorder, serve
from tests.fixtures.scripted_server import CHAT, Scripted, ask, events, proxied


async def test_credentials_and_hop_by_hop_headers_are_not_forwarded() -> None:
    upstream = Scripted(lambda _: (200, b"application/json", b"{}"))
    secrets = {"authorization": "Bearer gateway-key", "x-api-key": "gateway-key", "cookie": "session=gateway-key"}
    sent = {
        **secrets,
        "x-request-id": "r1",
        "x-slo-ttft-ms": "300",
        "te": "trailers",
        "connection": "x-hop",
        "x-hop": "1",
        "openai-organization": "o",
    }
    for key, send_slo in (("engine-key", False), (None, True)):
        async with proxied(upstream, api_key=key, send_slo=send_slo) as (_, client):
            await client.post(CHAT, json=ask(vllm_xargs={"antares_tpot_ms": 30, "mine": 1}), headers=sent)
    with_key, without_key = upstream.headers
    assert with_key[b"authorization"] == b"Bearer engine-key"
    assert b"authorization" not in without_key
    for headers in (with_key, without_key):
        assert b"gateway-key" not in b" ".join(headers.values())
        assert not {b"te", b"x-hop"} & set(headers)
        assert (headers[b"x-request-id"], headers[b"openai-organization"]) == (b"r1", b"o")
    assert b"x-slo-ttft-ms" not in with_key
    assert without_key[b"x-slo-ttft-ms"] == b"300"
    assert upstream.bodies[0]["vllm_xargs"] == {"mine": 1}
    assert upstream.bodies[1]["vllm_xargs"] == {"antares_tpot_ms": 30, "mine": 1}


async def test_no_headers_are_added_to_the_clients_request() -> None:
    upstream = Scripted(lambda _: (200, b"application/json", b"{}"))
    content = orjson.dumps(ask())
    async with serve(upstream) as url:
        engine = HttpEngine("remote", url)
        length, note = (b"content-length", b"%d" % len(content)), (b"x-note", "h\u00e9".encode())
        headers = [length, note, (b"x-two", b"1"), (b"x-two", b"2")]
        for method, path, body in (("POST", CHAT, content), ("GET", "/v1/files", b"")):
            scope = {"type": "http", "method": method, "path": path, "query_string": b"", "headers": headers}
            await _call(engine.app, scope, body)
        await engine.stop()
    identity = (b"accept-encoding", b"identity")
    post, get = upstream.lines
    assert get == [identity, note, (b"x-two", b"1"), (b"x-two", b"2")]
    assert post[1] == (b"content-length", b"%d" % len(orjson.dumps(upstream.bodies[0])))
    assert [post[0], *post[2:]] == get


async def _call(app: ASGIApp, scope: Scope, body: bytes) -> None:
    messages = [{"type": "http.request", "body": body}]

    async def receive() -> Any:
        return messages.pop() if messages else await asyncio.Event().wait()

    async def send(message: Any) -> None: ...

    await app(scope, receive, send)


async def test_compressed_stream_is_forwarded_uncompressed() -> None:
    token = {"choices": [{"index": 0, "delta": {"content": "hi"}, "finish_reason": None}]}
    stream, plain = events(token, token), b'{"data": []}'

    async def compressing(scope: Scope, receive: Receive, send: Send) -> None:
        body, kind = (stream, b"text/event-stream") if scope["path"] == CHAT else (plain, b"application/json")
        packed = gzip.compress(body)
        headers = [(b"content-type", kind), (b"content-encoding", b"gzip"), (b"content-length", b"%d" % len(packed))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": packed})

    recorder = Recorder()
    async with proxied(compressing, recorder) as (_, client):
        streamed = await client.post(CHAT, json=ask(stream=True, stream_options={"include_usage": True}))
        listed = await client.get("/v1/models")
    assert (streamed.content, listed.content) == (stream, plain)
    assert "content-encoding" not in streamed.headers
    assert listed.headers["content-encoding"] == "gzip", "other responses are forwarded unchanged"
    assert recorder.count() == 2


async def test_upstream_cookies_are_forwarded_but_not_stored() -> None:
    async def setting_cookies(scope: Scope, receive: Receive, send: Send) -> None:
        received.append(dict(scope["headers"]))
        headers = [(b"set-cookie", b"a=1; Path=/"), (b"set-cookie", b"b=2; Path=/")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"{}"})

    received: list[dict[bytes, bytes]] = []
    async with proxied(setting_cookies) as (_, client):
        first = await client.post(CHAT, json=ask())
        client.cookies.clear()
        await client.post(CHAT, json=ask())
    assert first.headers.get_list("set-cookie") == ["a=1; Path=/", "b=2; Path=/"]
    assert not any(b"cookie" in headers for headers in received)


async def test_any_route_passes_with_its_query_if_base_url_ends_in_v1() -> None:
    upstream = Scripted(lambda _: (200, b"application/json", b"[1]"))
    async with serve(upstream) as url:
        engine = HttpEngine("remote", url + "/v1/")
        async with httpx.AsyncClient(transport=httpx.ASGITransport(engine.app), base_url="http://e") as client:
            assert (await client.get("/v1/models?limit=2&after=a%20b")).json() == [1]
            assert (await client.delete("/v1/files/x%2Fy")).json() == [1]
            assert (await client.post(CHAT, content=b"not json")).json() == [1]
        await engine.stop()
    assert upstream.targets[:2] == [b"/v1/models?limit=2&after=a%20b", b"/v1/files/x%2Fy?"]


@pytest.mark.parametrize("size", [1, 7, 50, 10_000])
async def test_stream_bytes_are_independent_of_packet_sizes(size: int) -> None:
    token = {"choices": [{"index": 0, "delta": {"content": "h\u00e9"}, "finish_reason": None}]}
    usage = {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 2}}
    stream = b": hello\n\n" + events(token, token, usage)

    async def in_pieces(scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for at in range(0, len(stream), size):
            await send({"type": "http.response.body", "body": stream[at : at + size], "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    recorder = Recorder()
    async with proxied(in_pieces, recorder) as (_, client):
        with_usage = await client.post(CHAT, json=ask(stream=True, stream_options={"include_usage": True}))
        without_usage = await client.post(CHAT, json=ask(stream=True))
    assert with_usage.content == stream
    assert without_usage.content == b": hello\n\n" + events(token, token)
    assert recorder.count() == 4
