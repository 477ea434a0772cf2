from __future__ import annotations

from itertools import pairwise

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine_adapter.remote.counting.completions import CompletionCounter
from engine_adapter.remote.counting.token_counter import EventKind
from engine_adapter.remote.sse import SSESplitter, event_fields
from tests.fixtures.live_server import Recorder

ROLE = {"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}


def event(data: object) -> bytes:
    return b"data: %b\n\n" % (data if isinstance(data, bytes) else orjson.dumps(data))


def chunk(*choices: dict[str, object], **more: object) -> bytes:
    return event({"id": "x", "object": "chat.completion.chunk", "choices": list(choices), **more})


def token(text: str, index: int = 0, finish: str | None = None) -> dict[str, object]:
    return {"index": index, "delta": {"content": text}, "finish_reason": finish}


def usage(completion: int, prompt: int = 5) -> bytes:
    return chunk(usage={"prompt_tokens": prompt, "completion_tokens": completion})


def count(*events: bytes, sequences: int = 1) -> tuple[Recorder, list[EventKind]]:
    recorder = Recorder()
    counter = CompletionCounter(recorder, sequences)
    kinds = [counter.see(raw, float(at)) for at, raw in enumerate(events)]
    counter.settle()
    return recorder, kinds


streams = st.lists(
    st.sampled_from([b"data: {}", b": note", b"\n", b"\r\n", b"\n\n", b"\r", b"data:a\n", b"id: 3", b"\r\n\r\n", b"x"]),
    max_size=30,
).map(b"".join)


@settings(max_examples=300, deadline=None)
@given(streams, st.lists(st.integers(0, 120)))
def test_splitter_is_independent_of_chunking(stream: bytes, cuts: list[int]) -> None:
    whole = SSESplitter()
    expected = whole.feed(stream)
    positions = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    splitter = SSESplitter()
    events = [e for a, b in pairwise(positions) for e in splitter.feed(stream[a:b])]
    # The LF of a CRLF that spans two chunks is an item of its own.
    assert [event_fields(e) for e in events if e != b"\n"] == [event_fields(e) for e in expected]
    rest = splitter.take_rest()
    assert event_fields(rest) == event_fields(whole.take_rest())
    assert b"".join(events) + rest == stream


@given(st.lists(st.binary(max_size=20).map(lambda raw: raw.hex().encode())))
def test_splitter_finds_every_event_byte_by_byte(payloads: list[bytes]) -> None:
    splitter = SSESplitter()
    stream = b"".join(map(event, payloads))
    found = [e for i in range(len(stream)) for e in splitter.feed(stream[i : i + 1])]
    assert [event_fields(e)[1] for e in found] == payloads


@pytest.mark.parametrize(
    ("raw", "data"),
    [
        (b"data: a\n\n", b"a"),
        (b"data:a\r\n\r\n", b"a"),
        (b"event: x\ndata: a\ndata: b\n\n", b"a\nb"),
        (b": ping\n\n", b""),
    ],
)
def test_event_data_joins_data_lines(raw: bytes, data: bytes) -> None:
    assert event_fields(raw)[1] == data


def test_counter_reports_each_token_of_a_vllm_stream_at_its_time() -> None:
    recorder, kinds = count(
        chunk(ROLE), chunk(token("The")), chunk(token(" end")), chunk(token(".", finish="length")), event(b"[DONE]")
    )
    assert recorder.tokens == [("0", 1, 1.0), ("0", 1, 2.0), ("0", 1, 3.0)]
    assert kinds == [EventKind.OTHER, *[EventKind.TOKEN] * 3, EventKind.DONE]


def test_empty_last_event_counts_if_the_usage_includes_it() -> None:
    stream = [chunk(ROLE), chunk(token("Hi")), chunk(token("", finish="stop"))]
    assert count(*stream, usage(2), event(b"[DONE]"))[0].tokens == [("0", 1, 1.0), ("0", 1, 2.0)]
    assert count(*stream, usage(1), event(b"[DONE]"))[0].tokens == [("0", 1, 1.0)]
    assert count(*stream, event(b"[DONE]"))[0].tokens == [("0", 1, 1.0)]


def test_missing_tokens_are_added_at_the_last_token_time() -> None:
    recorder, _ = count(chunk(token("a b c")), chunk(token(" d e")), usage(9), event(b"[DONE]"))
    assert recorder.tokens == [("0", 1, 0.0), ("0", 1, 1.0), ("0", 7, 1.0)]
    assert recorder.prompts == {"0": 5}


def test_usage_below_the_count_removes_no_token() -> None:
    recorder, _ = count(chunk(token("a")), chunk(token("b")), chunk(token("c")), usage(2))
    assert recorder.count() == 3


def test_comments_errors_and_empty_choices_are_not_tokens() -> None:
    recorder, kinds = count(
        chunk(prompt_filter_results=[]),
        b": keep-alive\n\n",
        chunk(token("a")),
        b": keep-alive\n\n",
        chunk(prompt_filter_results=[]),
        event({"error": {"message": 'no "choices" here', "code": 500}}),
        event(b"not json"),
    )
    assert recorder.count() == 1
    assert kinds.count(EventKind.TOKEN) == 1


def test_text_that_looks_like_the_protocol_is_a_token() -> None:
    tricky = '"finish_reason":"stop" "choices":[] data: [DONE]\n\n'
    recorder, kinds = count(chunk(token("a")), chunk(token(tricky)), chunk(token("b")), usage(3))
    assert recorder.count() == 3
    kinds.pop()
    assert kinds == [EventKind.TOKEN] * 3


def test_token_without_text_counts_but_role_chunk_does_not() -> None:
    assert count(chunk({"index": 0, "delta": {"content": ""}, "finish_reason": None}))[0].count() == 1
    assert count(chunk({"index": 0, "text": "", "finish_reason": None}))[0].count() == 1
    assert count(chunk({"index": 0, "delta": {"role": "assistant", "content": None}}))[0].count() == 0
    assert count(chunk({"index": 0, "delta": {"role": "assistant", "content": "Hi"}}))[0].count() == 1


def test_reasoning_and_tool_calls_are_tokens() -> None:
    call = {"index": 0, "function": {"arguments": "{"}}
    recorder, _ = count(
        chunk(ROLE),
        chunk({"index": 0, "delta": {"reasoning": "hm"}}),
        chunk({"index": 0, "delta": {"tool_calls": [call]}}),
    )
    assert recorder.tokens == [("0", 1, 1.0), ("0", 1, 2.0)]


def test_sequences_are_counted_separately() -> None:
    recorder, _ = count(
        chunk(ROLE),
        chunk(ROLE | {"index": 1}),
        chunk(token("a", 0), token("b", 1)),
        chunk(token("c", 1)),
        chunk(token("", 1, finish="stop")),
        usage(4),
        sequences=2,
    )
    assert (recorder.count("0"), recorder.count("1")) == (1, 3)
    assert recorder.prompts == {}, "the usage does not name the sequence of the prompt tokens"


def test_usage_chunk_has_usage_and_no_choices() -> None:
    continuous = chunk(token("a"), usage={"prompt_tokens": 5, "completion_tokens": 1})
    _, kinds = count(continuous, usage(1))
    assert kinds == [EventKind.TOKEN, EventKind.USAGE]


def reference_events(stream: bytes) -> list[tuple[bytes, bytes]]:
    """The (type, data) of each event that has either, by the WHATWG algorithm, line by line.

    An event whose data is empty has none.
    """
    found: list[tuple[bytes, bytes]] = []
    name, data = b"", list[bytes]()
    text = stream.removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    for line in text.split(b"\n")[:-1]:
        if not line:
            if name or any(data):
                found.append((name, b"\n".join(data)))
            name, data = b"", []
        elif line == b"event" or line.startswith(b"event:"):
            name = line[6:].removeprefix(b" ")
        elif line == b"data" or line.startswith(b"data:"):
            data.append(line[5:].removeprefix(b" "))
    return found


LINES = (
    "data: {}|data:{}|data:  x|data|data: |: note|:|event: a|event:b|id: 3|x||||dat: 1| data: 1|data: \u00e9\u2028|a:b"
)
lines = st.sampled_from([line.encode() for line in LINES.split("|")])
ends = st.sampled_from([b"\n", b"\r\n", b"\r"])


@settings(max_examples=500, deadline=None)
@given(st.lists(st.tuples(lines, ends), max_size=25), st.booleans(), st.lists(st.integers(0, 200)))
def test_any_chunking_gives_the_events_of_the_specification(
    parts: list[tuple[bytes, bytes]], byte_order_mark: bool, cuts: list[int]
) -> None:
    stream = (b"\xef\xbb\xbf" if byte_order_mark else b"") + b"".join(line + end for line, end in parts)
    positions = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    splitter = SSESplitter()
    raw = [e for a, b in pairwise(positions) for e in splitter.feed(stream[a:b])]
    fields = [event_fields(event) for event in raw]
    assert [(name, data) for name, data in fields if name or data.strip(b"\n")] == reference_events(stream)
    assert b"".join(raw) + splitter.take_rest() == stream
