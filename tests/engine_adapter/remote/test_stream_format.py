"""The forms of event streams through an `HttpEngine`: line ends, comments, multi-line and long events."""

from __future__ import annotations

import orjson
import pytest

from engine_adapter.remote import sse as sse_module
from tests.fixtures.live_server import Recorder
from tests.fixtures.scripted_server import (
    DONE,
    answer_of,
    chunk,
    content,
    loss_of,
    usage_chunk,
)

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


async def test_half_of_a_surrogate_pair_is_no_error() -> None:
    """UTF-8 cannot hold it, but JSON can escape it. Some servers split an emoji over two events like this."""
    half = b'data: {"id":"c1","choices":[{"index":0,"delta":{"content":"a\\ud83d"},"finish_reason":"stop"}]}\n\n'
    assert content(await answer_of(half, DONE)) == "a\ud83d"
    assert (await answer_of(half, DONE, stream=True)).content == half + DONE


@pytest.mark.parametrize("stream", [True, False])
async def test_event_that_never_ends_fails_within_bounded_memory(stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse_module, "MAX_EVENT_BYTES", 1 << 16)
    lost = await loss_of(b"data: ", *[b"x" * 5000] * 20, 60.0, stream=stream)
    assert "larger than" in str(lost)


async def test_long_event_within_the_bound_passes() -> None:
    assert len(content(await answer_of(chunk("x" * 3_000_000, "stop"), DONE))) == 3_000_000


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("choices", [b'"choices":[],', b'"choices":null,', b'"choices" : null, ', b""])
async def test_usage_without_choices_in_any_spelling_is_counted_and_left_out(choices: bytes, stream: bool) -> None:
    """A client that did not ask for it may read the first choice of each event."""
    usage = b'data: {"id":"c1",%b"usage":{"prompt_tokens":5,"completion_tokens":20}}\n\n' % choices
    words = [chunk(word) for word in ("a ", "b ", "c ", "d ", "e ", "f ", "g ", "h ", "i ", "j ")]
    recorder = Recorder()
    response = await answer_of(*words, chunk(None, "stop"), usage, DONE, recorder=recorder, stream=stream)
    assert recorder.count() == 20
    if stream:
        assert response.content == b"".join([*words, chunk(None, "stop"), DONE])
    else:
        assert response.json()["usage"]["completion_tokens"] == 20


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
