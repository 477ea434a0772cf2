"""The SLO report on a response. Everything else in the response is the engine's, byte for byte."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai import AsyncOpenAI

from engine_adapter.engine import Receive, Scope, Send
from engine_adapter.step_time.linear_forms import StepTimes
from tests.fixtures.live_gateway import CHAT, TEXT, Live, chat, events, fast_engine, live, serving

FIRST_BYTE = ("x-antares-queue-ms", "x-antares-predicted-ttft-ms", "x-antares-ttft-ms")


@pytest.mark.parametrize("stream", [False, True])
async def test_response_headers_have_queue_time_and_ttft(antares: Live, stream: bool) -> None:
    answer = await antares.ask(chat(stream=stream), x_request_id="mine-1")
    queue, predicted, ttft = (float(answer.headers[name]) for name in FIRST_BYTE)
    assert 0 <= queue <= ttft < 1000
    assert predicted > 0
    assert answer.headers.get_list("x-request-id") == ["mine-1"]


@pytest.mark.parametrize("unsafe", ["a b", "x" * 129, "<script>", ""])
async def test_unsafe_request_id_is_replaced(antares: Live, unsafe: str) -> None:
    assert (await antares.ask(x_request_id=unsafe)).headers["x-request-id"] not in ("", unsafe)


async def test_stream_report_is_a_comment_before_done(antares: Live) -> None:
    answer = await antares.ask(chat(stream=True), x_slo_report="1")
    *_, last_chunk, comment, done, end = answer.text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    assert json.loads(last_chunk.removeprefix("data: "))["choices"]
    slo_report = json.loads(comment.removeprefix(": antares "))
    assert (slo_report["attained"], slo_report["violated"], slo_report["output_tokens"]) == (True, [], 8)
    assert slo_report["predicted_tokens"] == 8
    assert slo_report["ttft_ms"] <= slo_report["e2e_ms"]


async def test_plain_report_is_a_member_and_content_length_matches(antares: Live) -> None:
    answer = await antares.ask(x_slo_report="1")
    assert int(answer.headers["content-length"]) == len(answer.content)
    slo_report = answer.json()["antares"]
    assert (slo_report["slo_class"], slo_report["slo_ttft_ms"], slo_report["engine"]) == ("chat", 5000, "simulated")
    assert 0 < slo_report["ttft_ms"] < slo_report["e2e_ms"]


async def test_report_lists_violated_bounds() -> None:
    async with live(fast_engine(times=StepTimes(d=0.01)), policy={"name": "fcfs"}) as antares:
        answer = await antares.ask(x_slo_report="1", x_slo_tpot_ms="1", x_slo_e2e_ms="10")
        assert answer.json()["antares"]["violated"] == ["tpot", "e2e"]
        assert antares.gateway.ledger.attained == 0


@pytest.mark.parametrize("report", ["0", "1"])
async def test_openai_client_parses_responses_with_and_without_report(antares: Live, report: str) -> None:
    client = AsyncOpenAI(base_url=f"{antares.url}/v1", api_key="none", default_headers={"x-slo-report": report})
    whole = await client.chat.completions.create(**chat())
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 8
    stream = await client.chat.completions.create(**chat(stream=True, stream_options={"include_usage": True}))
    chunks = [chunk async for chunk in stream]
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 8


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize("stream", [False, True])
async def test_response_without_report_is_the_engine_body(antares: Live, path: str, stream: bool) -> None:
    sent: list[bytes] = []
    inner = antares.engine.app

    async def tapped(scope: Scope, receive: Receive, send: Send) -> None:
        async def tap(message: Any) -> None:
            sent.append(message.get("body", b""))
            await send(message)

        await inner(scope, receive, tap)

    antares.engine.stub = tapped
    answer = await antares.ask(chat(prompt="a story", stream=stream), path)
    assert answer.content == b"".join(sent)
    assert len(answer.content) > 100


class Scripted:
    """An engine's app that answers with ``chunks`` as one event stream, and reports one token for each."""

    def __init__(self, *chunks: bytes) -> None:
        self.chunks = chunks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for chunk in self.chunks:
            scope["antares.observer"].on_tokens("0", 1, 0.0)
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


TOKEN = b'data: {"choices":[{"index":0,"delta":{"content":"hi"}}]}\n\n'
DONE = b"data: [DONE]\n\n"
FAILURE = b'data: {"error": {"message": "out of memory", "code": 500}}\n\n'


async def test_report_ignores_done_inside_generated_text(antares: Live) -> None:
    mentions_done = TOKEN.replace(b"hi", b"then send data: [DONE] to end")
    antares.engine.stub = Scripted(mentions_done, TOKEN, DONE)
    answer = await antares.ask(chat(stream=True), x_slo_report="1")
    assert answer.text.startswith(mentions_done.decode())
    assert answer.text.count(": antares {") == 1


async def test_report_with_several_events_in_one_chunk(antares: Live) -> None:
    antares.engine.stub = Scripted(TOKEN + TOKEN + DONE)
    answer = await antares.ask(chat(stream=True), x_slo_report="1")
    assert answer.text.split("\n\n")[2].startswith(": antares {")


@pytest.mark.parametrize("chunks", [(TOKEN, FAILURE, DONE), (TOKEN + FAILURE + DONE,), (TOKEN, FAILURE + DONE)])
async def test_stream_with_error_event_counts_as_failed(antares: Live, chunks: tuple[bytes, ...]) -> None:
    antares.engine.stub = Scripted(*chunks)
    answer = await antares.ask(chat(stream=True), x_slo_report="1")
    assert antares.outcomes["failed"] == 1
    assert '"attained":true' not in answer.text


async def test_stream_has_the_same_chunks_as_from_the_engine(antares: Live) -> None:
    async with serving(antares.engine.app) as bare:
        direct = await antares.http.post(bare + CHAT, json=chat(stream=True))
    proxied = await antares.ask(chat(stream=True))

    def content(text: str) -> list[Any]:
        return [chunk["choices"] for chunk in events(text)]

    assert content(proxied.text) == content(direct.text)
