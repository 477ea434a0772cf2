"""Streams of other servers through an `HttpEngine`: their ends, their errors, and what is counted."""

from __future__ import annotations

import time
from typing import Any

import httpx
import orjson
import pytest

from engine_adapter.engine import FAILED_KEY, EngineLost, Message
from engine_adapter.remote import proxy as proxy_module
from engine_adapter.remote import sse as sse_module
from engine_adapter.remote.engine import HttpEngine
from tests.fixtures.live_server import Recorder, observed, serve
from tests.fixtures.scripted_server import (
    BREAK,
    CHAT,
    DONE,
    Scripted,
    ScriptedStream,
    ask,
    chunk,
    proxied,
    usage_chunk,
)

STREAM = b"text/event-stream"
HELLO = (chunk("Hello"), chunk(" you", "stop"))


async def answer_of(*steps: bytes | float, recorder: Recorder | None = None, **fields: Any) -> httpx.Response:
    """The response to a chat whose server sends ``steps``. ``fields``: of the chat."""
    async with proxied(ScriptedStream(steps), recorder) as (_, client):
        return await client.post(CHAT, json=ask(**fields))


async def loss_of(*steps: bytes | float, **fields: Any) -> EngineLost:
    """The `EngineLost` that a chat ends with whose server sends ``steps``."""
    async with serve(ScriptedStream(steps)) as url:
        engine = HttpEngine("remote", url)
        try:
            async with httpx.AsyncClient(transport=httpx.ASGITransport(engine.app), base_url="http://e") as client:
                with pytest.raises(EngineLost) as lost:
                    await client.post(CHAT, json=ask(**fields))
        finally:
            await engine.stop()
    return lost.value


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


def content(response: httpx.Response) -> str:
    return str(response.json()["choices"][0]["message"]["content"])


# --- line ends, comments, other fields --------------------------------------------------------------------------------

EVENTS = [chunk(role="assistant", content=""), chunk("Hé"), chunk("llo", "stop"), usage_chunk(3), DONE]


@pytest.mark.parametrize("size", [1, 3, 64, 100_000])
@pytest.mark.parametrize("line_end", [b"\n", b"\r\n", b"\r"], ids=["LF", "CRLF", "CR"])
async def test_every_line_end_gives_the_same_answer_in_any_packets(line_end: bytes, size: int) -> None:
    stream = b"".join(EVENTS).replace(b"\n", line_end)
    steps = [stream[at : at + size] for at in range(0, len(stream), size)]
    plain, streamed = Recorder(), Recorder()
    assert content(await answer_of(*steps, recorder=plain)) == "Héllo"
    options = {"stream_options": {"include_usage": True}}
    response = await answer_of(*steps, recorder=streamed, stream=True, **options)
    # A foreign form of the last event is replaced by the usual one.
    text = b"".join(EVENTS[:-1]).replace(b"\n", line_end)
    assert response.content.startswith(text)
    assert response.content[len(text) :].strip() == b"data: [DONE]"
    assert plain.count() == streamed.count() == 3
    assert plain.prompts == streamed.prompts == {"0": 5}


async def test_bom_comments_ids_and_multi_line_data_are_understood() -> None:
    pretty = orjson.dumps(orjson.loads(chunk("Hi", "stop")[6:]), option=orjson.OPT_INDENT_2)
    lines = b"\n".join(b"data:" + line for line in pretty.split(b"\n"))
    stream = (b"\xef\xbb\xbf: hello\n\n", b"event: message\nid: 7\nretry: 5\n" + lines + b"\n\n", b"data:[DONE]\n\n")
    recorder = Recorder()
    assert content(await answer_of(*stream, recorder=recorder)) == "Hi"
    assert recorder.count() == 1
    streamed = await answer_of(*stream, stream=True)
    assert streamed.content == b"".join(stream[:2]) + DONE


@pytest.mark.parametrize("stream", [True, False])
async def test_event_that_never_ends_fails_within_bounded_memory(stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse_module, "MAX_EVENT_BYTES", 1 << 16)
    lost = await loss_of(b"data: ", *[b"x" * 5000] * 20, 60.0, stream=stream)
    assert "larger than" in str(lost)


async def test_long_event_within_the_bound_passes() -> None:
    assert len(content(await answer_of(chunk("x" * 3_000_000, "stop"), DONE))) == 3_000_000


@pytest.mark.parametrize("stream", [True, False])
async def test_usage_in_every_event_and_two_sequences_are_counted(stream: bool) -> None:
    """As with ``continuous_usage_stats``."""
    recorder = Recorder()
    steps = []
    for number, index in enumerate((0, 1, 0, 1), start=1):
        finish = "stop" if number > 2 else None
        choice = {"index": index, "delta": {"content": "ab"[index]}, "finish_reason": finish}
        usage = {"prompt_tokens": 5, "completion_tokens": number, "total_tokens": 5 + number}
        steps.append(b"data: %b\n\n" % orjson.dumps({"choices": [choice], "usage": usage}))
    options = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}} if stream else {}
    response = await answer_of(*steps, usage_chunk(4), DONE, recorder=recorder, stream=stream, n=2.0, **options)
    assert (recorder.count("0"), recorder.count("1")) == (2, 2)
    if stream:
        assert response.content == b"".join([*steps, usage_chunk(4), DONE])
    else:
        assert [c["message"]["content"] for c in response.json()["choices"]] == ["aa", "bb"]
        assert response.json()["usage"]["completion_tokens"] == 4


# --- the end of a stream ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("after", [5.0, BREAK], ids=["stays open", "breaks"])
async def test_answer_is_complete_at_done(after: float, stream: bool) -> None:
    began = time.monotonic()
    recorder = Recorder()
    response = await answer_of(*HELLO, usage_chunk(2), DONE, after, recorder=recorder, stream=stream)
    assert time.monotonic() - began < 4
    assert response.status_code == 200
    assert recorder.count() == 2
    assert response.text.endswith("data: [DONE]\n\n") if stream else content(response) == "Hello you"


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    "steps",
    [
        (chunk("Hello"),),
        (chunk("Hello"), BREAK),
        (chunk(role="assistant", content=""),),
        (b": comment\n\n",),
        (),
        (chunk("Hello"), usage_chunk(1)),
        (chunk("Hello"), chunk(" you", "stop")[:-20]),
        (chunk("Hello", finish=""),),
    ],
    ids=["ends", "breaks", "role only", "comment only", "empty", "usage only", "half an event", "empty reason"],
)
async def test_stream_without_an_end_is_a_failure(steps: tuple[bytes | float, ...], stream: bool) -> None:
    await loss_of(*steps, stream=stream)


async def test_log_names_the_cause_of_a_lost_response_once(caplog: pytest.LogCaptureFixture) -> None:
    async with serve(ScriptedStream([chunk("secret")])) as url:
        engine = HttpEngine("remote", url)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(engine.app), base_url="http://e") as client:
            for _ in range(3):
                with pytest.raises(EngineLost):
                    await client.post(CHAT, json=ask())
        await engine.stop()
    (line,) = [r.getMessage() for r in caplog.records if "lost" in r.getMessage()]
    assert line.startswith("lost a response: engine remote at http")
    assert line.endswith("the stream ended before the response was complete")
    assert "secret" not in line


@pytest.mark.parametrize("stream", [True, False])
async def test_one_unfinished_choice_of_two_is_a_failure(stream: bool) -> None:
    await loss_of(chunk("a", "stop"), chunk("b", index=1), stream=stream, n=2)
    await loss_of(chunk("a", "stop"), stream=stream, n=2)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("end", [(), (BREAK,), (usage_chunk(2),)], ids=["ends", "breaks", "usage"])
async def test_stream_without_done_is_complete_if_every_choice_is(end: tuple[bytes, ...], stream: bool) -> None:
    response = await answer_of(*HELLO, *end, stream=stream)
    assert response.status_code == 200
    assert response.content.startswith(HELLO[0]) if stream else content(response) == "Hello you"
    two = await answer_of(chunk("a", "stop"), chunk("b", "length", index=1), *end, stream=stream, n=2)
    assert two.status_code == 200


async def test_last_event_without_its_blank_line_counts() -> None:
    assert content(await answer_of(*HELLO, b"data: [DONE]")) == "Hello you"
    assert content(await answer_of(chunk("Hello"), chunk(" you", "stop").rstrip())) == "Hello you"


async def test_connection_is_reused_after_done() -> None:
    peers: list[Any] = []
    upstream = ScriptedStream([*HELLO, DONE])

    async def recording(scope: Any, receive: Any, send: Any) -> None:
        if scope["method"] == "POST":
            peers.append(scope["client"])
        await upstream(scope, receive, send)

    async with proxied(recording) as (_, client):
        for stream in (True, False, True):
            await client.post(CHAT, json=ask(stream=stream))
    assert len(set(peers)) == 1


async def test_nothing_after_done_reaches_the_client() -> None:
    response = await answer_of(*HELLO, DONE + chunk("more"), chunk("more"), stream=True)
    assert response.content == b"".join(HELLO) + DONE


# --- errors inside a stream -------------------------------------------------------------------------------------------

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


# --- a document instead of a stream -----------------------------------------------------------------------------------


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
        headers = [(b"content-type", STREAM), (b"content-encoding", b"br")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"\x0b"})

    async with proxied(compressing) as (_, client):
        response = await client.post(CHAT, json=ask(stream=True))
    assert (response.status_code, "br" in response.text) == (502, True)


# --- counting ---------------------------------------------------------------------------------------------------------


async def test_batched_tokens_with_usage_have_the_right_total() -> None:
    recorder = Recorder()
    batches = [chunk(" w w w w") for _ in range(20)]
    await answer_of(*batches, chunk("", "stop"), usage_chunk(81), DONE, recorder=recorder, stream=True)
    assert recorder.count() == 81
    assert recorder.tokens[-1][2] >= recorder.tokens[0][2]


@pytest.mark.parametrize("stream", [True, False])
async def test_batched_tokens_without_usage_are_counted_from_the_text(stream: bool) -> None:
    recorder = Recorder()
    batches = [chunk(" words and then more") for _ in range(60)]
    await answer_of(*batches, chunk("", "stop"), DONE, recorder=recorder, stream=stream)
    assert recorder.count() == pytest.approx(240, rel=0.1)


async def test_single_tokens_without_usage_are_counted_as_events() -> None:
    recorder = Recorder()
    words = [" international", " the", ".", "\n\n", " don", "'t", " {", "東京", "()", "::", "1234", " "] * 10
    await answer_of(*map(chunk, words), chunk("", "stop"), DONE, recorder=recorder, stream=True)
    assert recorder.count() == len(words)


async def test_step_times_of_batched_tokens_are_per_token() -> None:
    steps: list[bytes | float] = []
    for _ in range(16):
        steps += [chunk(" a b c d e f g h"), 0.08]
    async with proxied(ScriptedStream([*steps, chunk("", "stop"), DONE])) as (engine, client):
        await client.post(CHAT, json=ask(stream=True))
    model = engine.state.step_time
    model.refit()
    assert model.itl(1, 64) == pytest.approx(0.01, rel=0.6), "a gap of 80 ms is eight steps"


@pytest.mark.parametrize("cached", [-1, True, "3", 2.0, None, 6, 1 << 40, []])
@pytest.mark.parametrize("stream", [True, False])
async def test_impossible_cached_tokens_are_ignored(cached: Any, stream: bool) -> None:
    recorder = Recorder()
    await answer_of(*HELLO, usage_chunk(2, 5, cached_tokens=cached), DONE, recorder=recorder, stream=stream)
    assert (recorder.cached, recorder.prompts) == ({}, {"0": 5})


@pytest.mark.parametrize("cached", [0, 4, 5])
async def test_cached_tokens_are_reported(cached: int) -> None:
    recorder = Recorder()
    await answer_of(*HELLO, usage_chunk(2, 5, cached_tokens=cached), DONE, recorder=recorder, stream=True)
    assert recorder.cached == {"0": cached}


@pytest.mark.parametrize("count", [-4, "9", True, 1 << 40, None, 1.5])
async def test_impossible_usage_leaves_the_count_of_events(count: Any) -> None:
    recorder = Recorder()
    await answer_of(*HELLO, usage_chunk(count, count), DONE, recorder=recorder, stream=True)
    assert (recorder.count(), recorder.prompts) == (2, {})


async def test_server_cannot_invent_sequences() -> None:
    recorder = Recorder()
    odd = [chunk("x", index=i) for i in (0, 1, 7, 10**9)]
    await answer_of(*odd, chunk("y", "stop"), chunk("y", "stop", index=1), DONE, recorder=recorder, n=2, stream=True)
    assert {name for name, _, _ in recorder.tokens} == {"0", "1"}


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
