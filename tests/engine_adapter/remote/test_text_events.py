"""Events that differ in their text only are recognised, and counted and assembled as if they were parsed."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_adapter.remote.assemble import Assembler
from engine_adapter.remote.counting.completions import CompletionCounter
from engine_adapter.remote.counting.token_counter import EventKind
from engine_adapter.remote.sse import ParsedEvent
from engine_adapter.remote.text_events import TextEvents
from tests.fixtures.live_server import Recorder

HEAD = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "m"}


def event(choice: Any, head: Any = HEAD, **fields: Any) -> bytes:
    return b"data: %b\n\n" % orjson.dumps({**head, "choices": [choice], **fields})


def chat_event(text: Any, **fields: Any) -> bytes:
    return event({"index": 0, "delta": {"content": text}, "logprobs": None, "finish_reason": None, **fields})


def learned(raw: bytes) -> TextEvents:
    texts = TextEvents()
    texts.learn(ParsedEvent.of(raw))
    return texts


def test_event_with_the_same_bytes_around_its_text_is_recognised() -> None:
    texts = learned(chat_event(" Paris"))
    assert texts.text_of(chat_event(" is")) == b" is"
    assert texts.text_of(chat_event("東京")) == "東京".encode()
    assert texts.place == (0, "content")


def test_text_of_a_completion_is_recognised() -> None:
    raw = event({"index": 0, "text": " a", "logprobs": None, "finish_reason": None, "stop_reason": None})
    texts = learned(raw)
    assert texts.text_of(raw.replace(b'" a"', b'" bc"')) == b" bc"
    assert texts.place == (0, "text")


@pytest.mark.parametrize(
    "other",
    [
        chat_event(""),
        chat_event('a "quote"'),
        chat_event("a \\ backslash"),
        chat_event("line\nline"),
        chat_event(None),
        chat_event("end", finish_reason="stop"),
        chat_event("x", logprobs={"content": []}),
        event({"index": 1, "delta": {"content": "x"}, "logprobs": None, "finish_reason": None}),
        chat_event("x")[:-1],
        chat_event("x").replace(b'"x"', b'"x\ty"'),
        chat_event("x").replace(b'"x"', b'"x'),
        b": comment\n\n",
        b"data: [DONE]\n\n",
        b"",
    ],
)
def test_other_events_are_not_recognised(other: bytes) -> None:
    assert learned(chat_event(" Paris")).text_of(other) is None


@pytest.mark.parametrize(
    "raw",
    [
        event({"index": 0, "delta": {"content": "a", "tool_calls": [{"index": 0}]}, "finish_reason": None}),
        event({"index": 0, "delta": {"content": "a", "reasoning": "b"}, "finish_reason": None}),
        event({"index": 0, "delta": {"content": ["a"]}}),
        event({"index": 0, "delta": {"content": "a"}, "token_ids": [5]}),
        event({"index": 0, "delta": {"content": "a"}}, usage={"prompt_tokens": 1}),
        event({"index": "0", "delta": {"content": "a"}}),
        event({"index": True, "delta": {"content": "a"}}),
        event({"index": 0, "text": "a", "delta": {"content": "a"}}),
        event({"index": 0, "delta": {"content": "a"}}, head={**HEAD, "note": {"content": "b"}}),
        event({"index": 0, "delta": {"content": 'a"b'}}),
        event({"index": 0, "delta": {"role": "assistant", "content": ""}}).replace(b"data: ", b"data: \ndata: "),
        b'data: {"choices": 5}\n\n',
        b"data: 5\n\n",
    ],
)
def test_events_with_more_than_a_text_are_not_learned(raw: bytes) -> None:
    texts = learned(raw)
    assert texts.text_of(raw) is None
    assert texts.text_of(raw.replace(b'"a"', b'"c"')) is None


def test_role_in_every_event_is_no_obstacle() -> None:
    raw = event({"index": 0, "delta": {"role": "assistant", "content": "a"}, "finish_reason": None})
    assert learned(raw).text_of(raw.replace(b'"a"', b'"bc"')) == b"bc"


def assembled(events: list[bytes], fast: bool) -> tuple[Any, int, int]:
    """Return the response, the tokens reported, and the estimated tokens per event in thousandths."""
    recorder, assembler = Recorder(), Assembler()
    counter = CompletionCounter(recorder)
    at = 0
    while at < len(events):
        texts = counter.see_texts(events, 1.0, at) if fast else []
        if texts:
            assembler.add_texts(counter.texts.place, texts, sum(map(len, events[at : at + len(texts)])))
        else:
            parsed = ParsedEvent.of(events[at])
            counter.see_parsed(parsed, 1.0)
            assembler.add(parsed)
        at += len(texts) or 1
    counter.settle()
    return assembler.response(), recorder.count(), round(1000 * counter.tokens_per_event)


TEXTS = st.text(st.sampled_from('ab 1"\\\n\t東é😀/{}'), max_size=6)
CHOICES = st.one_of(
    TEXTS.map(lambda text: {"index": 0, "delta": {"content": text}, "logprobs": None, "finish_reason": None}),
    TEXTS.map(lambda text: {"index": 0, "delta": {"content": text}, "finish_reason": None}),
    TEXTS.map(lambda text: {"index": 0, "delta": {"role": "assistant", "content": text}}),
    TEXTS.map(lambda text: {"index": 0, "delta": {"reasoning_content": text}}),
    TEXTS.map(lambda text: {"index": 0, "delta": {"content": text}, "finish_reason": "stop"}),
    TEXTS.map(
        lambda text: {"index": 0, "delta": {"tool_calls": [{"index": 0, "id": "t", "function": {"arguments": text}}]}}
    ),
)


@given(st.lists(CHOICES, min_size=1, max_size=30), st.booleans())
def test_response_and_counts_are_those_of_parsed_events(choices: list[Any], usage: bool) -> None:
    events = [event(choice) for choice in choices] + [b"data: [DONE]\n\n"]
    if usage:
        end = {**HEAD, "choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 40}}
        events.insert(-1, b"data: %b\n\n" % orjson.dumps(end))
    assert assembled(events, fast=True) == assembled(events, fast=False)


@given(st.lists(CHOICES, min_size=1, max_size=200), st.integers(1, 100))
def test_events_of_one_read_count_like_single_events(choices: list[Any], size: int) -> None:
    events = [event(choice) for choice in choices] + [b"data: [DONE]\n\n", chat_event("late")]
    one, together = Recorder(), Recorder()
    alone, counter = CompletionCounter(one), CompletionCounter(together)
    kinds = [alone.see(raw, 1.0) for raw in events[:-1]]
    seen: list[tuple[EventKind, bytes]] = []
    for at in range(0, len(events), size):
        seen += [] if counter.ended else counter.see_all(events[at : at + size], 1.0)
    assert seen == list(zip(kinds, events[:-1], strict=True))
    assert (together.count(), counter.tokens_per_event) == (one.count(), alone.tokens_per_event)


@given(st.lists(TEXTS, min_size=1, max_size=30))
def test_completion_texts_are_those_of_parsed_events(texts: list[str]) -> None:
    head = {**HEAD, "object": "text_completion"}
    events = [event({"index": 0, "text": text, "finish_reason": None}, head) for text in texts]
    assert assembled(events, fast=True) == assembled(events, fast=False)


def test_invalid_bytes_in_a_text_are_replaced() -> None:
    events = [chat_event("a"), chat_event("b"), chat_event("X").replace(b"X", b"\xff"), b"data: [DONE]\n\n"]
    status, body = assembled(events, fast=True)[0]
    assert (status, body["choices"][0]["message"]["content"]) == (200, "ab�")
