"""Errors inside a stream through an `HttpEngine`."""

from __future__ import annotations

import time
from typing import Any

import httpx
import orjson
import pytest

from engine_adapter.engine import FAILED_KEY, Message
from engine_adapter.remote.engine import HttpEngine
from tests.fixtures.live_server import Recorder, serve
from tests.fixtures.scripted_server import (
    BREAK,
    CHAT,
    DONE,
    HELLO,
    ScriptedStream,
    answer_of,
    ask,
    chunk,
    content,
)


async def messages_of(*steps: bytes | float, path: str = CHAT) -> list[Message]:
    """The ASGI messages of a streamed response."""
    sent: list[Message] = []
    async with serve(ScriptedStream(steps)) as url:
        engine = HttpEngine("remote", url)
        app = engine.app

        async def recording(scope: Any, receive: Any, send: Any) -> None:
            async def recorded(message: Message) -> None:
                sent.append(message)
                await send(message)

            await app(scope, receive, recorded)

        async with httpx.AsyncClient(transport=httpx.ASGITransport(recording), base_url="http://e") as client:
            await client.post(path, json=ask(stream=True))
        await engine.stop()
    return sent


ERRORS: dict[str, tuple[bytes, int, str]] = {
    "openai": (b'data: {"error": {"message": "boom", "code": 503}}\n\n', 503, "boom"),
    "id first": (b'data: {"id": "1", "error": {"message": "boom", "code": "429"}}\n\n', 429, "boom"),
    "object": (b'data: {"object": "error", "message": "boom", "type": "Internal", "code": 500}\n\n', 500, "boom"),
    "event": (b'event: error\ndata: {"message": "boom"}\n\n', 500, "boom"),
    "event, text": (b"event: error\ndata: boom\n\n", 500, "boom"),
    "event, empty": (b"event: error\n\n", 500, ""),
    "event last": (b'data: {"detail": "boom"}\nevent:error\n\n', 500, "boom"),
    "CRLF": (b'event: error\r\ndata: {"error": "boom"}\r\n\r\n', 500, "boom"),
    "type": (b'data: {"type": "error", "message": "boom"}\n\n', 500, "boom"),
    "about the request": (
        b'data: {"error": {"message": "boom", "type": "invalid_request_error", "code": "context_length_exceeded"}}\n\n',
        400,
        "boom",
    ),
    "about the request, TGI": (b'event:error\ndata:{"error": "boom", "error_type": "validation"}\n\n', 400, "boom"),
    "of the engine, TGI": (b'event:error\ndata:{"error": "boom", "error_type": "generation"}\n\n', 500, "boom"),
    "types that are no text": (b'data: {"error": {"message": "boom", "type": [], "code": {}}}\n\n', 500, "boom"),
    "with choices": (
        b'data: {"error": {"message": "boom", "code": 502}, "choices": [{"index": 0, "delta": {"content": ""}, '
        b'"finish_reason":null}]}\n\n',
        502,
        "boom",
    ),
    "finish reason error": (
        b'data: {"error": {"message": "boom"}, "choices": [{"index": 0, "delta": {}, "finish_reason": "error"}]}\n\n',
        500,
        "boom",
    ),
}


@pytest.mark.parametrize(("event", "status", "message"), ERRORS.values(), ids=ERRORS)
@pytest.mark.parametrize("end", [(), (DONE,), (BREAK,), (5.0,)], ids=["ends", "done", "breaks", "stays open"])
async def test_error_amid_a_stream_is_an_error_status_of_a_plain_request(
    event: bytes, status: int, message: str, end: tuple[bytes | float, ...]
) -> None:
    began = time.monotonic()
    response = await answer_of(chunk("Hel"), event, *end)
    assert (response.status_code, response.json()["error"]["message"]) == (status, message)
    assert time.monotonic() - began < 4


@pytest.mark.parametrize(("event", "status", "message"), ERRORS.values(), ids=ERRORS)
async def test_error_amid_a_stream_is_passed_on_in_the_form_that_clients_know(
    event: bytes, status: int, message: str
) -> None:
    sent = await messages_of(chunk("Hel"), event, 5.0)
    token, error, done, end = (message["body"] for message in sent[1:])
    assert (token, done, end) == (chunk("Hel"), DONE, b"")
    assert error.startswith(b'data: {"error"')
    assert orjson.loads(error[6:])["error"]["message"] == message
    assert [FAILED_KEY in message for message in sent] == [False, False, True, False, False]


async def test_null_error_member_is_no_error() -> None:
    quiet = b'data: {"error":null,"choices":[{"index":0,"delta":{"content":"a"},"finish_reason":null}]}\n\n'
    recorder = Recorder()
    response = await answer_of(quiet, quiet, quiet, HELLO[1], DONE, recorder=recorder)
    assert (response.status_code, content(response)) == (200, "aaa you")
    assert recorder.count() == 4


async def test_text_about_errors_is_no_error() -> None:
    text = '"error": {"message": "event: error"}\n\nevent: error\n\n'
    response = await answer_of(chunk("a"), chunk(text), chunk("b", "stop"), DONE)
    assert content(response) == f"a{text}b"
