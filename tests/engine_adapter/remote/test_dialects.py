"""`/v1/responses` and Anthropic's `/v1/messages` through an `HttpEngine`: what is counted, their ends, their errors."""

from __future__ import annotations

from typing import Any

import httpx
import orjson
import pytest

from engine_adapter.engine import FAILED_KEY, EngineLost, Message
from engine_adapter.remote.counting.by_path import counter_for
from engine_adapter.remote.counting.completions import BatchCounter, CompletionCounter
from engine_adapter.remote.counting.messages import MessagesCounter
from engine_adapter.remote.counting.responses import ResponsesCounter
from engine_adapter.remote.counting.token_counter import TokenCounter
from engine_adapter.remote.engine import HttpEngine
from tests.fixtures.live_server import Recorder, serve
from tests.fixtures.scripted_server import BREAK, Scripted, ScriptedStream, proxied

RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"


def event(kind: str, **fields: Any) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), orjson.dumps({"type": kind, **fields}))


def response_object(status: str, **fields: Any) -> dict[str, Any]:
    usage = {"input_tokens": 50, "output_tokens": 7, "input_tokens_details": {"cached_tokens": 32}}
    return {"object": "response", "status": status, "error": None, "usage": usage, **fields}


def text_delta(text: str) -> bytes:
    return event("response.output_text.delta", item_id="i", output_index=0, delta=text)


def block_delta(text: str, kind: str = "text_delta", field: str = "text") -> bytes:
    return event("content_block_delta", index=0, delta={"type": kind, field: text})


CREATED = event("response.created", response={"status": "in_progress", "error": None, "usage": None})
COMPLETED = event("response.completed", response=response_object("completed"))
RESPONSE_STREAM = [
    CREATED,
    event("response.reasoning_text.delta", delta="hm"),
    *map(text_delta, ("Hel", "lo", " you")),
    event("response.function_call_arguments.delta", delta="{}"),
    event("response.output_text.done", text="Hello you"),
    COMPLETED,
]
START = event("message_start", message={"usage": {"input_tokens": 18, "cache_read_input_tokens": 32}})
LAST_DELTA = event("message_delta", delta={"stop_reason": "end_turn"}, usage={"output_tokens": 7})
STOP = event("message_stop")
MESSAGE_STREAM = [
    START,
    event("ping"),
    event("content_block_start", index=0, content_block={"type": "text", "text": ""}),
    block_delta("hm", "thinking_delta", "thinking"),
    *map(block_delta, ("Hel", "lo", " you")),
    block_delta("{}", "input_json_delta", "partial_json"),
    block_delta("c2ln", "signature_delta", "signature"),
    event("content_block_stop", index=0),
    LAST_DELTA,
    STOP,
]
STREAMS = [(RESPONSES, RESPONSE_STREAM), (MESSAGES, MESSAGE_STREAM)]
IDS = ["responses", "messages"]


async def answer_of(path: str, *steps: bytes | float, recorder: Recorder | None = None) -> httpx.Response:
    async with proxied(ScriptedStream(steps), recorder) as (_, client):
        return await client.post(path, json={"model": "m", "stream": True, "input": "x"})


def test_counter_is_chosen_by_the_route() -> None:
    assert counter_for("/v1/responses") is ResponsesCounter
    assert counter_for("/v1/messages") is MessagesCounter
    for path in ("/v1/messages/count_tokens", "/v1/threads/t/messages", "/v1/responses/r1", "/v1/embeddings"):
        assert counter_for(path) is None
    assert counter_for("/v1/completions") is counter_for("/v1/chat/completions") is CompletionCounter
    assert counter_for("/v1/chat/completions/batch") is BatchCounter


@pytest.mark.parametrize(("path", "stream"), STREAMS, ids=IDS)
@pytest.mark.parametrize("after", [(), (5.0,), (BREAK,)], ids=["ends", "stays open", "breaks"])
async def test_stream_passes_unchanged_and_is_counted(path: str, stream: list[bytes], after: tuple[float, ...]) -> None:
    recorder = Recorder()
    response = await answer_of(path, *stream, *after, recorder=recorder)
    assert response.content == b"".join(stream)
    assert (recorder.count(), recorder.prompts, recorder.cached) == (7, {"0": 50}, {"0": 32})
    assert len(recorder.tokens) == 6, "five deltas, and what is missing by the usage"


@pytest.mark.parametrize(("path", "stream"), STREAMS, ids=IDS)
async def test_stream_without_event_lines_is_counted(path: str, stream: list[bytes]) -> None:
    recorder = Recorder()
    await answer_of(path, *(item.partition(b"\n")[2] for item in stream), recorder=recorder)
    assert recorder.count() == 7


@pytest.mark.parametrize(("path", "stream"), STREAMS, ids=IDS)
@pytest.mark.parametrize("line_end", [b"\r\n", b"\r"], ids=["CRLF", "CR"])
async def test_stream_with_other_line_ends_is_counted(path: str, stream: list[bytes], line_end: bytes) -> None:
    recorder = Recorder()
    data = b"".join(stream).replace(b"\n", line_end)
    response = await answer_of(path, *(data[i : i + 7] for i in range(0, len(data), 7)), recorder=recorder)
    assert recorder.count() == 7
    assert response.content.rstrip() == data.rstrip()


@pytest.mark.parametrize(("path", "stream"), STREAMS, ids=IDS)
@pytest.mark.parametrize("end", [(), (BREAK,)], ids=["ends", "breaks"])
async def test_stream_without_its_last_event_is_a_failure(
    path: str, stream: list[bytes], end: tuple[float, ...]
) -> None:
    async with serve(ScriptedStream([*stream[:-1], *end])) as url:
        engine = HttpEngine("remote", url)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(engine.app), base_url="http://e") as client:
            with pytest.raises(EngineLost):
                await client.post(path, json={"stream": True})
        await engine.stop()


async def test_incomplete_response_is_complete_and_counted() -> None:
    recorder = Recorder()
    end = event("response.incomplete", response=response_object("incomplete"))
    assert (await answer_of(RESPONSES, CREATED, text_delta("a"), end, recorder=recorder)).status_code == 200
    assert recorder.count() == 7


FAILURES = [
    (RESPONSES, event("response.failed", response=response_object("failed", error={"message": "boom"}))),
    (RESPONSES, event("response.failed")),
    (RESPONSES, event("error", message="boom", code="server_error")),
    (RESPONSES, b'data: {"error": {"message": "boom"}}\n\n'),
    (MESSAGES, event("error", error={"type": "overloaded_error", "message": "boom"})),
    (MESSAGES, b'data: {"type": "error", "error": {"message": "boom"}}\n\n'),
    (MESSAGES, b"event: error\ndata: boom\n\n"),
]


@pytest.mark.parametrize(("path", "failure"), FAILURES)
async def test_error_passes_in_the_form_that_clients_know_and_is_marked(path: str, failure: bytes) -> None:
    sent: list[Message] = []
    first = text_delta("a") if path == RESPONSES else block_delta("a")
    async with serve(ScriptedStream([first, failure, 5.0])) as url:
        engine = HttpEngine("remote", url)
        app = engine.app

        async def recording(scope: Any, receive: Any, send: Any) -> None:
            async def recorded(message: Message) -> None:
                sent.append(message)
                await send(message)

            await app(scope, receive, recorded)

        async with httpx.AsyncClient(transport=httpx.ASGITransport(recording), base_url="http://e") as client:
            await client.post(path, json={"stream": True})
        await engine.stop()
    # An event without the type that clients look for gets it.
    expected = failure if failure.startswith(b"event: ") else b"event: error\n" + failure
    assert [message["body"] for message in sent[1:]] == [first, expected, b""]
    assert [FAILED_KEY in message for message in sent] == [False, False, True, False]


MESSAGE = {
    "type": "message",
    "content": [{"type": "text", "text": "Hello you"}],
    "usage": {"input_tokens": 18, "cache_read_input_tokens": 32, "output_tokens": 7},
}


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("path", "document"), [(RESPONSES, response_object("completed")), (MESSAGES, MESSAGE)], ids=IDS
)
async def test_document_passes_unchanged_and_is_counted(path: str, document: dict[str, Any], stream: bool) -> None:
    recorder, data = Recorder(), orjson.dumps(document)
    upstream = Scripted(lambda _: (200, b"application/json", data))
    async with proxied(upstream, recorder) as (_, client):
        response = await client.post(path, json={"stream": stream, "input": "x"})
    assert (response.status_code, response.content) == (200, data)
    assert (recorder.count(), recorder.prompts, recorder.cached) == (7, {"0": 50}, {"0": 32})
    assert recorder.unobserved is not stream
    assert upstream.bodies == [{"stream": stream, "input": "x"}], "never turned into a stream"


async def test_batch_of_chats_is_counted_and_never_turned_into_a_stream() -> None:
    recorder, body = Recorder(), {"messages": [[{"role": "user", "content": "a"}], [{"role": "user", "content": "b"}]]}
    data = orjson.dumps({"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 12}})
    upstream = Scripted(lambda _: (200, b"application/json", data))
    async with proxied(upstream, recorder) as (_, client):
        assert (await client.post("/v1/chat/completions/batch", json=body)).content == data
    assert upstream.bodies == [body]
    assert (recorder.count(), recorder.prompts) == (12, {}), "the prompt tokens are of both chats"


async def test_failed_response_document_passes_and_is_marked() -> None:
    sent: list[Message] = []
    data = orjson.dumps(response_object("failed", error={"code": "server_error", "message": "boom"}))
    async with serve(Scripted(lambda _: (200, b"application/json", data))) as url:
        engine = HttpEngine("remote", url)

        async def recording(scope: Any, receive: Any, send: Any) -> None:
            async def recorded(message: Message) -> None:
                sent.append(message)
                await send(message)

            await engine.app(scope, receive, recorded)

        async with httpx.AsyncClient(transport=httpx.ASGITransport(recording), base_url="http://e") as client:
            assert (await client.post(RESPONSES, json={})).content == data
        await engine.stop()
    assert sent[-1][FAILED_KEY]


async def test_error_document_of_messages_gets_an_error_status() -> None:
    data = orjson.dumps({"type": "error", "error": {"type": "overloaded_error", "message": "boom"}})
    async with proxied(Scripted(lambda _: (200, b"application/json", data))) as (_, client):
        response = await client.post(MESSAGES, json={})
    assert (response.status_code, response.content) == (500, data)


@pytest.mark.parametrize(
    ("counter", "delta"), [(ResponsesCounter, text_delta), (MessagesCounter, block_delta)], ids=IDS
)
def test_several_tokens_an_event_without_usage_are_counted_from_the_text(
    counter: type[TokenCounter], delta: Any
) -> None:
    recorder = Recorder()
    counting = counter(recorder)
    for number in range(80):
        counting.see(delta(" words and then more"), float(number))
    counting.settle()
    assert recorder.count() == pytest.approx(320, rel=0.1)


@pytest.mark.parametrize(
    "usage",
    [
        None,
        [],
        {"input_tokens": "x", "output_tokens": -1},
        {"input_tokens": True, "input_tokens_details": []},
        {"input_tokens": 5, "input_tokens_details": {"cached_tokens": 6}, "cache_read_input_tokens": -2},
    ],
)
@pytest.mark.parametrize("path", [RESPONSES, MESSAGES])
async def test_impossible_usage_is_ignored(path: str, usage: Any) -> None:
    recorder = Recorder()
    if path == RESPONSES:
        steps = [text_delta("a"), event("response.completed", response={"usage": usage})]
    else:
        steps = [event("message_start", message={"usage": usage}), block_delta("a"), STOP]
    assert (await answer_of(path, *steps, recorder=recorder)).status_code == 200
    assert (recorder.count(), recorder.cached) == (1, {})
