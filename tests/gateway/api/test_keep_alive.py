"""Comments that keep the connection of a waiting stream alive, and the headers of event streams."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from openai import APIError, AsyncOpenAI

from engine_adapter.step_time.linear_forms import StepTimes
from gateway.api.http_request import HttpRequest
from gateway.api.keep_alive import COMMENT, KeepAlive
from gateway.api.routes.table import RouteTable
from tests.fixtures.live_gateway import CHAT, AdmitNothing, Live, chat, events, fast_engine, live
from tests.fixtures.live_server import eventually

SOON = {"sse_keep_alive_s": 0.1}
SLOW_PREFILL = StepTimes(d=0.001, alpha=0.1)
"""Each prompt token takes 0.1 s."""


def waiting_first(antares: Live) -> None:
    """Have the policy admit nothing."""
    for queue in antares.gateway.engine_queues:
        queue.admission.policy = AdmitNothing()  # type: ignore[assignment]


@pytest.mark.parametrize("path", [CHAT, "/v1/audio/speech"])
@pytest.mark.parametrize("server", [{}, SOON])
async def test_event_stream_is_neither_cached_nor_buffered(server: dict[str, Any], path: str) -> None:
    async with live(server=server) as antares:

        async def stream(scope: Any, receive: Any, send: Any) -> None:
            headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

        antares.engine.stub = stream
        answer = await antares.ask(chat(stream=True), path)
        assert answer.headers.get_list("cache-control") == ["no-cache"]
        assert answer.headers.get_list("x-accel-buffering") == ["no"]


async def test_cache_control_of_the_engine_stays(antares: Live) -> None:
    async def stream(scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"Content-Type", b"text/event-stream"), (b"Cache-Control", b"no-store")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    antares.engine.stub = stream
    answer = await antares.ask(chat(stream=True))
    assert answer.headers.get_list("cache-control") == ["no-store"]


async def test_plain_answer_has_no_stream_headers(antares: Live) -> None:
    assert "x-accel-buffering" not in (await antares.ask()).headers


async def test_waiting_stream_gets_comments_and_then_its_answer() -> None:
    async with live(fast_engine(times=SLOW_PREFILL), server=SOON) as antares:
        answer = await antares.ask(chat("one two three four", stream=True), x_slo_report="1", x_request_id="mine")
        assert answer.status_code == 200
        assert answer.text.startswith(COMMENT.decode())
        assert "".join(e["choices"][0]["delta"].get("content") or "" for e in events(answer.text))
        assert answer.text.endswith("data: [DONE]\n\n")
        assert answer.headers["x-request-id"] == "mine"
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert "x-antares-ttft-ms" not in answer.headers
        report = json.loads(answer.text.split(": antares ")[1].split("\n")[0])
        assert report["ttft_ms"] >= 400  # comments are not tokens
        assert 2 <= answer.text.count(": keep-alive") <= report["ttft_ms"] / 100 + 1
        assert antares.outcomes["finished"] == 1


async def test_stream_that_answers_in_time_has_no_comment_and_all_headers() -> None:
    async with live(server={"sse_keep_alive_s": 3}) as antares:
        answer = await antares.ask(chat(stream=True))
        assert "keep-alive" not in answer.text
        assert "x-antares-ttft-ms" in answer.headers


@pytest.mark.parametrize("server", [{}, SOON])
async def test_plain_request_gets_no_comment(server: dict[str, Any]) -> None:
    async with live(fast_engine(times=SLOW_PREFILL), server=server) as antares:
        answer = await antares.ask(chat("one two"), x_slo_class="free")
        assert answer.json()["choices"]


async def test_no_comment_by_default() -> None:
    async with live(fast_engine(times=SLOW_PREFILL)) as antares:
        answer = await antares.ask(chat("one two", stream=True))
        assert "keep-alive" not in answer.text


async def test_later_rejection_is_an_error_event() -> None:
    async with live(server=SOON) as antares:
        waiting_first(antares)
        task = asyncio.create_task(antares.ask(chat(stream=True)))
        await eventually(lambda: antares.gateway.ledger.open_count == 1)
        await asyncio.sleep(0.25)
        antares.gateway.router.close()
        answer = await task
        assert answer.status_code == 200
        assert answer.text.count(": keep-alive") >= 1
        assert events(answer.text)[-1]["error"]["code"] == "draining"
        assert answer.text.endswith("data: [DONE]\n\n")
        assert 'status="503"' in (await antares.http.get("/metrics")).text


@pytest.mark.parametrize(
    ("status", "content_type", "body", "expected"),
    [
        (400, b"application/json", b'{"error": {"message": "too long"}}', "too long"),
        (500, b"text/html", b"<html>broken</html>", "neither a stream nor JSON"),
        (200, b"application/json", b'{"choices": []}', '"choices":[]'),
        (500, b"text/event-stream", b'{"error": {"message": "odd"}}', "odd"),
        (200, b"text/plain", b"x" * (3 << 20), "not a stream"),
    ],
)
async def test_other_answer_of_the_engine_becomes_an_event(
    status: int, content_type: bytes, body: bytes, expected: str
) -> None:
    async with live(server=SOON) as antares:

        async def late(scope: Any, receive: Any, send: Any) -> None:
            await asyncio.sleep(0.25)
            await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", content_type)]})
            for start in range(0, len(body), 1 << 20):
                piece = body[start : start + (1 << 20)]
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b""})

        antares.engine.stub = late
        answer = await antares.ask(chat(stream=True))
        assert answer.status_code == 200
        assert answer.text.startswith(": keep-alive")
        assert expected in answer.text
        assert len(answer.content) < 2000


async def test_openai_client_reads_past_comments_and_raises_at_the_error_event() -> None:
    async with live(fast_engine(times=SLOW_PREFILL), server=SOON) as antares:
        client = AsyncOpenAI(base_url=f"{antares.url}/v1", api_key="none", max_retries=0)
        stream = await client.chat.completions.create(**chat("one two three"), stream=True)
        assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
        waiting_first(antares)
        asyncio.get_running_loop().call_later(0.3, antares.gateway.router.close)
        with pytest.raises(APIError, match="shutting down"):
            async for _ in await client.chat.completions.create(**chat(), stream=True):
                pass


async def test_engine_lost_while_comments_are_sent_is_an_error_event() -> None:
    async with live(fast_engine(times=SLOW_PREFILL), server=SOON) as antares:
        task = asyncio.create_task(antares.ask(chat("one two three four five six", stream=True)))
        await asyncio.sleep(0.3)
        antares.engine.crash()
        answer = await task
        assert events(answer.text)[-1]["error"]["code"] == "engine_lost"


async def test_client_that_leaves_while_it_waits_frees_its_place() -> None:
    async with live(server=SOON) as antares:
        waiting_first(antares)
        async with antares.http.stream("POST", CHAT, json=chat(stream=True)) as answer:
            assert "keep-alive" in await anext(answer.aiter_lines())
        await eventually(antares.is_idle)
        assert antares.outcomes["cancelled"] == 1
        await eventually(lambda: "keep alive" not in {task.get_name() for task in asyncio.all_tasks()})


async def test_messages_are_not_interleaved_if_the_client_reads_slowly() -> None:
    sent: list[Any] = []
    writable = asyncio.Event()

    async def slow_send(message: Any) -> None:
        sent.append("begin")
        await writable.wait()
        sent.append("end")

    scope = {"type": "http", "path": CHAT, "method": "POST", "headers": []}
    http = HttpRequest(scope, slow_send, slow_send, 0.0, RouteTable().find(CHAT))  # type: ignore[arg-type]
    with KeepAlive(http, 0.01):
        await asyncio.sleep(0.05)
        start = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]}
        answering = asyncio.create_task(http.send(start))
        await asyncio.sleep(0.02)
        assert sent == ["begin"]
        writable.set()
        await answering
        await http.send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})
    assert sent == ["begin", "end"] * (len(sent) // 2)
    # The gateway's own start is the only one: start, comment, last event.
    assert len(sent) == 6
    assert http.client_send is slow_send


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (CHAT, b'data: {"error":{"code":"a","message":"b"}}\n\ndata: [DONE]\n\n'),
        ("/v1/messages", b'event: error\ndata: {"error":{"code":"a","message":"b"}}\n\n'),
        (
            "/v1/responses",
            b'event: error\ndata: {"type":"error","code":"a","message":"b","param":null,"sequence_number":0,'
            b'"error":{"code":"a","message":"b"}}\n\n',
        ),
    ],
)
def test_error_event_has_the_shape_of_the_api(path: str, expected: bytes) -> None:
    assert RouteTable().find(path).errors.last_events(b'{"error":{"code":"a","message":"b"}}', 0) == expected
