"""Paths and methods that the gateway answers itself: 404 and 405 in OpenAI's shape."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from gateway.api.errors import ApiError
from gateway.api.paths import unknown_path
from gateway.api.routes.table import RouteTable
from tests.fixtures.live_gateway import CHAT, Live, chat
from tests.fixtures.live_server import HANG_S

CHAT_BODY = json.dumps(chat()).encode()


async def send_raw(antares: Live, target: str, *headers: str) -> tuple[int, Any]:
    """POST a chat whose path and headers no client library normalises. Returns status and parsed body."""
    url = httpx.URL(antares.url)
    reader, writer = await asyncio.open_connection(url.host, url.port)
    lines = [f"POST {target} HTTP/1.1", "host: a", "connection: close", "content-type: application/json", *headers]
    writer.write("\r\n".join([*lines, f"content-length: {len(CHAT_BODY)}", "", ""]).encode() + CHAT_BODY)
    answer = await asyncio.wait_for(reader.read(), HANG_S)
    writer.close()
    head_bytes, _, body = answer.partition(b"\r\n\r\n")
    return int(head_bytes.split()[1]), json.loads(body[body.index(b"{") : body.rindex(b"}") + 1])


UNSAFE = [
    "/v1/../metrics",
    "/v1/x/../chat/completions",
    "/v1/./chat/completions",
    "/v1/%2e%2e/metrics",
    "/v1/%2E%2E/metrics",
    "/v1/.%2e/metrics",
    "/v1/..%2Fmetrics",
    "/v1/%2e%2e%2fmetrics",
    "/v1/%252e%252e/metrics",
    "/v1/..;/metrics",
    "/v1/..;a=b/metrics",
    "/v1/x\\..\\metrics",
    "/v1/x%5c..%5cmetrics",
    "/v1/chat%2Fcompletions",
    "/v1/models/..%2f..%2fmetrics",
    "/v1//chat/completions",
    "/v1/chat//completions",
    "/v1/chat/completions/",
    "/v1/chat/completions/..",
    "/v1/models/a%00b",
    "/v1/models/a%0d%0ab",
    "/v1/",
    "/v1/v1/chat/completions",
]


@pytest.mark.parametrize("target", UNSAFE)
async def test_unsafe_path_gets_404_and_never_reaches_an_engine(antares: Live, target: str) -> None:
    bodies = antares.record_bodies()
    status, answer = await send_raw(antares, target)
    assert (status, answer["error"]["code"]) == (404, "not_found"), answer
    assert bodies == []


@pytest.mark.parametrize("target", ["/v1/responses/resp_a.b/cancel", "/v1/embeddings?a=.."])
async def test_plain_path_reaches_the_engine(antares: Live, target: str) -> None:
    antares.echo_bodies()
    assert (await send_raw(antares, target))[0] == 200


@pytest.mark.parametrize(
    ("path", "suggested"),
    [
        ("/chat/completions", CHAT),
        ("//v1/chat/completions", CHAT),
        ("/v1//chat/completions", CHAT),
        ("/V1/Chat/Completions", CHAT),
        ("/v1/v1/chat/completions", CHAT),
        ("/openai/v1/chat/completions", CHAT),
        ("/v1/chat/completions/", CHAT),
        ("/v1/chat/completion", CHAT),
        ("/completions", "/v1/completions"),
        ("/messages", "/v1/messages"),
        ("/models", "/v1/models"),
        ("/metric", "/metrics"),
        ("/health/", "/health"),
        ("/healthz", "/health"),
    ],
)
def test_unknown_path_suggests_the_route_that_was_meant(path: str, suggested: str) -> None:
    assert f"Did you mean {suggested}?" in unknown_path(path).message


@pytest.mark.parametrize("path", ["/", "/v1", "/favicon.ico", "/" + "a/" * 5000, "/\x00\n", "/v1/v1/x"])
def test_unknown_path_without_a_likely_route_suggests_none(path: str) -> None:
    message = unknown_path(path).message
    assert "Did you mean" not in message
    assert len(message) < 160
    assert message.isprintable()


@pytest.mark.parametrize("path", ["/chat/completions", "//v1/chat/completions", "/nothing", "/v1"])
async def test_unknown_route_gets_404_in_openai_shape(antares: Live, path: str) -> None:
    status, answer = await send_raw(antares, path)
    assert status == 404
    assert answer["error"].keys() == {"message", "type", "param", "code"}


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "OPTIONS"])
@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/v1/responses", "/v1/messages", "/v1/embeddings"])
def test_generation_route_takes_post_only(method: str, path: str) -> None:
    with pytest.raises(ApiError) as raised:
        RouteTable().find(path).check(method, path)
    assert raised.value.status == 405
    assert (b"allow", b"POST") in raised.value.headers


@pytest.mark.parametrize(
    ("path", "method", "allow"),
    [(CHAT, "GET", "POST"), ("/v1/models", "OPTIONS", "GET, HEAD"), ("/metrics", "POST", "GET, HEAD")],
)
async def test_wrong_method_gets_405_in_openai_shape(antares: Live, path: str, method: str, allow: str) -> None:
    answer = await antares.http.request(method, path)
    assert (answer.status_code, answer.headers["allow"]) == (405, allow)
    assert answer.json()["error"]["code"] == "method_not_allowed"


@pytest.mark.parametrize("path", ["/health", "/ready", "/metrics", "/status", "/dashboard", "/docs", "/v1/models"])
async def test_head_gets_the_status_of_get_without_its_body(antares: Live, path: str) -> None:
    answer = await antares.http.head(path)
    assert (answer.status_code, answer.content) == (200, b"")


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "/v1/models", None),
        ("GET", "/v1/models/simulated", None),
        ("POST", "/v1/responses", {"model": "simulated", "input": "hi"}),
        ("POST", "/v1/responses", {"model": "simulated", "input": "hi", "stream": True}),
        ("POST", "/v1/messages", {**chat(), "max_tokens": 2}),
        ("POST", "/v1/embeddings", {"model": "simulated", "input": "hi"}),
        ("POST", CHAT, chat(stream=True)),
    ],
)
async def test_every_route_returns_the_request_id(antares: Live, method: str, path: str, body: Any) -> None:
    if path == "/v1/embeddings":
        antares.echo_bodies()
    answer = await antares.http.request(method, path, json=body, headers={"X-Request-Id": "mine"})
    assert answer.status_code == 200
    assert answer.headers.get_list("x-request-id") == ["mine"]


@pytest.mark.parametrize("value", ["free ", "free\t", "  free"])
async def test_header_values_are_trimmed(antares: Live, value: str) -> None:
    headers = [f"x-slo-class: {value}", "x-slo-report: 1 ", "x-slo-ttft-ms:  9000 ", "x-slo-output-tokens: 7 "]
    status, answer = await send_raw(antares, CHAT, *headers)
    assert status == 200
    report = answer["antares"]
    assert (report["slo_class"], report["slo_ttft_ms"], report["predicted_tokens"]) == ("free", 9000, 7)


async def test_request_id_is_trimmed(antares: Live) -> None:
    url = httpx.URL(antares.url)
    reader, writer = await asyncio.open_connection(url.host, url.port)
    writer.write(b"GET /v1/responses/resp_1 HTTP/1.0\r\nx-request-id: mine \r\n\r\n")
    seen: list[bytes] = []
    inner = antares.engine.app

    async def spy(scope: Any, receive: Any, send: Any) -> None:
        seen.extend(value for name, value in scope["headers"] if name == b"x-request-id")
        await inner(scope, receive, send)

    antares.engine.stub = spy
    await asyncio.wait_for(reader.read(), HANG_S)
    writer.close()
    assert seen == [b"mine"]
