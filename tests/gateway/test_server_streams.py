"""Streams of other servers (`kind: http`) behind the gateway: outcomes, SLO reports, and what the client gets."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import httpx
import orjson
import pytest
from openai import APIError, AsyncOpenAI

from engine_adapter.engine import ASGIApp
from engine_adapter.remote.engine import HttpEngine
from tests.fixtures.live_gateway import Live, chat, live
from tests.fixtures.live_server import eventually, serve
from tests.fixtures.scripted_server import DONE, Scripted, ScriptedStream, chunk, usage_chunk

BATCH_S = 0.08
CLASSES = {"chat": {"ttft_ms": 5000, "tpot_ms": 60}}


@asynccontextmanager
async def gateway_before(upstream: ASGIApp) -> AsyncIterator[Live]:
    """A gateway whose only engine is the server ``upstream``."""
    async with serve(upstream) as url, live(HttpEngine("remote", url), classes=CLASSES) as antares:
        yield antares


async def answer_of(
    steps: Sequence[bytes | float], stream: bool, content_type: bytes = b"text/event-stream"
) -> tuple[httpx.Response, dict[str, int]]:
    """The response to a chat whose server sends ``steps``, and how many requests had each outcome."""
    async with gateway_before(ScriptedStream(steps, content_type)) as antares:
        answer = await antares.ask(chat(stream=stream), x_slo_report="1")
        await eventually(antares.is_idle)
        return answer, antares.outcomes


def report_of(answer: httpx.Response) -> dict[str, Any]:
    """The SLO report of a response."""
    if not answer.headers["content-type"].startswith("text/event-stream"):
        return dict(answer.json()["antares"])
    (comment,) = [line for line in answer.text.splitlines() if line.startswith(": antares ")]
    return dict(json.loads(comment.removeprefix(": antares ")))


async def test_truncated_stream_fails() -> None:
    answer, outcomes = await answer_of([chunk("Hel")], stream=True)
    assert answer.content.startswith(chunk("Hel"))
    assert '"code":"engine_lost"' in answer.text.replace(" ", "")
    assert (outcomes["failed"], outcomes["finished"]) == (1, 0)
    answer, outcomes = await answer_of([chunk("Hel")], stream=False)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_lost")
    assert (outcomes["failed"], outcomes["finished"]) == (1, 0)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    "error",
    [
        b'data: {"object": "error", "message": "boom"}\n\n',
        b"event: error\ndata: boom\n\n",
        b'event: error\r\ndata: {"detail": "boom"}\r\n\r\n',
    ],
)
async def test_error_event_fails(error: bytes, stream: bool) -> None:
    answer, outcomes = await answer_of([chunk("Hel"), error, DONE], stream=stream)
    assert "boom" in answer.text
    assert answer.status_code == (200 if stream else 500)
    assert (outcomes["failed"], outcomes["finished"]) == (1, 0)


async def test_document_instead_of_a_stream_attains() -> None:
    usage = {"prompt_tokens": 9, "completion_tokens": 12}
    message = {"index": 0, "message": {"content": "Hello"}, "finish_reason": "stop"}
    data = orjson.dumps({"choices": [message], "usage": usage})
    async with gateway_before(Scripted(lambda _: (200, b"application/json", data))) as antares:
        report = report_of(await antares.ask(chat(stream=True), x_slo_report="1"))
        assert antares.gateway.ledger.attained == 1
    assert (report["output_tokens"], report["attained"]) == (12, True)
    assert report["ttft_ms"] > 0


@pytest.mark.process
@pytest.mark.parametrize("usage", [(), (usage_chunk(41),)], ids=["no usage", "usage"])
@pytest.mark.parametrize("stream", [True, False])
async def test_tpot_of_batched_tokens_is_per_token(usage: tuple[bytes, ...], stream: bool) -> None:
    steps: list[bytes | float] = []
    for _ in range(10):
        steps += [chunk(" one two three four"), BATCH_S]
    answer, outcomes = await answer_of([*steps, chunk("", "stop"), *usage, DONE], stream)
    report = report_of(answer)
    assert outcomes["finished"] == 1
    assert report["output_tokens"] == pytest.approx(41, abs=2)
    assert report["tpot_ms"] < 60, "80 ms for four tokens"
    assert report["violated"] == []


@pytest.mark.parametrize("after", [5.0, -1.0], ids=["stays open", "breaks"])
@pytest.mark.parametrize("line_end", [b"\n", b"\r\n", b"\r"], ids=["LF", "CRLF", "CR"])
async def test_stream_with_its_end_finishes_with_a_report(line_end: bytes, after: float) -> None:
    stream = b"".join([chunk("a"), chunk("b", "stop"), DONE]).replace(b"\n", line_end)
    answer, outcomes = await answer_of([stream, after], stream=True)
    assert outcomes["finished"] == 1
    assert report_of(answer)["output_tokens"] == 2


def named(kind: str, **fields: Any) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), orjson.dumps({"type": kind, **fields}))


USAGE = {"input_tokens": 50, "output_tokens": 7}
ENDS = [
    ("/v1/responses", named("response.completed", response={"usage": USAGE}), "finished"),
    ("/v1/responses", named("response.incomplete", response={"usage": USAGE}), "finished"),
    ("/v1/responses", named("response.failed", response={"error": {"message": "boom"}}), "failed"),
    ("/v1/responses", named("error", message="boom"), "failed"),
    ("/v1/responses", b'data: {"error": {"message": "boom"}}\n\n', "failed"),
    ("/v1/responses", b"", "failed"),
    ("/v1/messages", named("message_delta", usage=USAGE) + named("message_stop"), "finished"),
    ("/v1/messages", named("error", error={"message": "boom"}), "failed"),
    ("/v1/messages", b'data: {"type": "error", "error": {"message": "boom"}}\n\n', "failed"),
    ("/v1/messages", b"", "failed"),
]


@pytest.mark.parametrize(("path", "end", "outcome"), ENDS)
async def test_other_apis_end_with_the_right_outcome(path: str, end: bytes, outcome: str) -> None:
    tokens = [named("response.output_text.delta", delta="a")] * 3
    if path == "/v1/messages":
        tokens = [named("content_block_delta", delta={"type": "text_delta", "text": "a"})] * 3
    async with gateway_before(ScriptedStream([*tokens, end])) as antares:
        body = {"model": "m", "input": "x", "messages": [{"role": "user", "content": "x"}], "max_tokens": 9}
        answer = await antares.ask({**body, "stream": True}, path=path, x_slo_report="1")
        await eventually(antares.is_idle)
        assert antares.outcomes[outcome] == 1
    assert answer.content.startswith(b"".join(tokens))
    if outcome == "finished":
        assert report_of(answer)["output_tokens"] == 7
    elif end:
        assert "boom" in answer.text


@pytest.mark.parametrize(
    ("document", "outcome"),
    [
        ({"object": "response", "status": "completed", "usage": USAGE}, "finished"),
        ({"object": "response", "status": "failed", "error": {"message": "boom"}, "usage": USAGE}, "failed"),
    ],
)
async def test_response_document_has_the_right_outcome(document: dict[str, Any], outcome: str) -> None:
    async with gateway_before(Scripted(lambda _: (200, b"application/json", orjson.dumps(document)))) as antares:
        answer = await antares.ask({"model": "m", "input": "x"}, path="/v1/responses")
        assert antares.outcomes[outcome] == 1
    assert (answer.status_code, answer.json()) == (200, document)


@pytest.mark.parametrize("stream", [True, False])
async def test_html_page_with_status_200_fails(stream: bool) -> None:
    answer, outcomes = await answer_of([b"<html>"], stream, b"text/html")
    assert answer.status_code == 502
    assert "remote" in answer.json()["error"]["message"]
    assert outcomes["failed"] == 1


async def test_openai_client_sees_a_foreign_error_as_an_error() -> None:
    """As the server sends it, the client would take it for a chunk."""
    foreign = b'data: {"object": "error", "message": "boom"}\n\n'
    async with gateway_before(ScriptedStream([chunk("a"), foreign])) as antares:
        client = AsyncOpenAI(base_url=f"{antares.url}/v1", api_key="none", max_retries=0)
        stream = await client.chat.completions.create(**chat(stream=True))
        with pytest.raises(APIError, match="boom"):
            _ = [event async for event in stream]


async def test_anthropic_client_sees_a_foreign_error_as_an_error() -> None:
    """As the server sends it, the client would ignore it."""
    anthropic = pytest.importorskip("anthropic")
    delta = named("content_block_delta", index=0, delta={"type": "text_delta", "text": "a"})
    async with gateway_before(ScriptedStream([delta, b'data: {"type": "error", "message": "boom"}\n\n'])) as antares:
        client = anthropic.AsyncAnthropic(base_url=antares.url, api_key="none", max_retries=0)
        body = {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "x"}], "stream": True}
        with pytest.raises(anthropic.AnthropicError, match="boom"):
            _ = [event async for event in await client.messages.create(**body)]
