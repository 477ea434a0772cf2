"""Servers that answer with a document or a page instead of a stream, through an `HttpEngine`."""

from __future__ import annotations

from typing import Any

import httpx
import orjson
import pytest

from engine_adapter.engine import Message
from engine_adapter.remote import proxy as proxy_module
from engine_adapter.remote.engine import HttpEngine
from tests.fixtures.live_server import Recorder, observed, serve
from tests.fixtures.scripted_server import (
    CHAT,
    Scripted,
    ask,
    proxied,
)


def document(text: str = "Hello you", **usage: Any) -> bytes:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    return orjson.dumps({"object": "chat.completion", "choices": [choice], **({"usage": usage} if usage else {})})


@pytest.mark.parametrize("stream", [True, False])
async def test_document_instead_of_a_stream_passes_and_is_counted(stream: bool) -> None:
    recorder = Recorder()
    data = document(prompt_tokens=40, completion_tokens=12, prompt_tokens_details={"cached_tokens": 32})
    upstream = Scripted(lambda _: (200, b"application/json; charset=utf-8", data))
    async with proxied(upstream, recorder) as (_, client):
        response = await client.post(CHAT, json=ask(stream=stream))
    assert (response.status_code, response.content) == (200, data)
    assert response.headers["content-type"] == "application/json"
    assert (recorder.count(), recorder.prompts, recorder.cached) == (12, {"0": 40}, {"0": 32})


async def test_document_without_usage_is_counted_from_its_text() -> None:
    recorder = Recorder()
    data = document("one two three four five six seven eight.")
    async with proxied(Scripted(lambda _: (200, b"application/json", data)), recorder) as (_, client):
        await client.post(CHAT, json=ask(stream=True))
    assert recorder.count() == 9


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("error", "status"),
    [
        ({"error": {"message": "no", "code": 429}}, 429),
        ({"error": "no"}, 500),
        ({"object": "error", "message": "no", "code": 400}, 400),
    ],
)
async def test_error_document_with_status_200_gets_an_error_status(
    error: dict[str, Any], status: int, stream: bool
) -> None:
    upstream = Scripted(lambda _: (200, b"application/json", orjson.dumps(error)))
    async with proxied(upstream) as (_, client):
        response = await client.post(CHAT, json=ask(stream=stream))
    assert response.status_code == status
    assert "no" in response.text


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("kind", "data"),
    [
        (b"text/html", b"<html>502 Bad Gateway</html>"),
        (b"Text/HTML; charset=utf-8", b"<h1>login</h1>"),
        (b"text/plain", b"upstream connect error"),
        (b"application/json", b'{"choices": ['),
        (b"application/json", b"[]"),
        (b"application/json", b""),
    ],
)
async def test_page_that_claims_success_is_a_502_naming_the_engine(kind: bytes, data: bytes, stream: bool) -> None:
    recorder = Recorder()
    async with proxied(Scripted(lambda _: (200, kind, data)), recorder) as (_, client):
        response = await client.post(CHAT, json=ask(stream=stream))
    assert response.status_code == 502
    assert "engine remote" in response.json()["error"]["message"]
    assert recorder.tokens == []


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("status", [204, 205])
async def test_success_without_a_body_is_a_502(status: int, stream: bool) -> None:
    recorder = Recorder()
    async with proxied(Scripted(lambda _: (status, b"", b"")), recorder) as (_, client):
        response = await client.post(CHAT, json=ask(stream=stream))
    assert response.status_code == 502
    assert f"status {status}" in response.json()["error"]["message"]
    assert recorder.tokens == []


async def test_document_with_another_status_of_success_is_counted() -> None:
    recorder = Recorder()
    data = document(prompt_tokens=40, completion_tokens=12)
    async with proxied(Scripted(lambda _: (201, b"application/json", data)), recorder) as (_, client):
        response = await client.post(CHAT, json=ask())
    assert (response.status_code, response.content, recorder.count()) == (200, data, 12)


async def test_html_page_as_the_answer_to_any_post_is_a_502() -> None:
    async with proxied(Scripted(lambda _: (200, b"text/html", b"<html>"))) as (_, client):
        assert (await client.post("/v1/embeddings", json={"input": "x"})).status_code == 502
        assert (await client.post("/v1/messages", json=ask())).json()["type"] == "error"
        assert (await client.get("/v1/files/page/content")).text == "<html>", "a file may be a page"


async def test_unreadable_compression_is_a_502() -> None:
    async def compressing(scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"content-type", b"text/event-stream"), (b"content-encoding", b"br")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"\x0b"})

    async with proxied(compressing) as (_, client):
        response = await client.post(CHAT, json=ask(stream=True))
    assert (response.status_code, "br" in response.text) == (502, True)


async def test_large_document_passes_without_being_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxy_module, "LARGEST_PARSED", 1000)
    data = document("x" * 200_000)
    async with proxied(Scripted(lambda _: (200, b"application/json", data))) as (_, client):
        assert (await client.post(CHAT, json=ask(), headers={"x": "y"})).content == data


async def test_observer_is_told_tokens_before_the_document_ends() -> None:
    order: list[str] = []

    class Watching(Recorder):
        def on_tokens(self, sequence: str, count: int, at: float) -> None:
            order.append("tokens")

    data = document(prompt_tokens=1, completion_tokens=2)
    async with serve(Scripted(lambda _: (200, b"application/json", data))) as url:
        engine = HttpEngine("remote", url)
        app = observed(engine.app, Watching())

        async def recording(scope: Any, receive: Any, send: Any) -> None:
            async def recorded(message: Message) -> None:
                order.append(message["type"])
                await send(message)

            await app(scope, receive, recorded)

        async with httpx.AsyncClient(transport=httpx.ASGITransport(recording), base_url="http://e") as client:
            await client.post(CHAT, json=ask(stream=True))
        await engine.stop()
    assert order[0] == "tokens"
