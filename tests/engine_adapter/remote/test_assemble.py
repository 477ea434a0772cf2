from __future__ import annotations

from typing import Any

import orjson
import pytest

from engine_adapter.remote.assemble import Assembler, can_rebuild
from engine_adapter.remote.sse import ParsedEvent
from engine_adapter.remote.tool_calls import UnreadableStream

HEAD = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 7, "model": "m", "system_fingerprint": "f"}


def assembled(*chunks: dict[str, Any], head: dict[str, Any] = HEAD) -> tuple[int, dict[str, Any]]:
    assembler = Assembler()
    for chunk in chunks:
        assembler.add(ParsedEvent.of(b"data: %b\n\n" % orjson.dumps(head | chunk)))
    assembler.add(ParsedEvent.of(b"data: [DONE]\n\n"))
    assert assembler.complete
    return assembler.response()


def delta(index: int = 0, finish: str | None = None, **fields: Any) -> dict[str, Any]:
    return {"choices": [{"index": index, "delta": fields, "logprobs": None, "finish_reason": finish}]}


USAGE = {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}}


def test_chat_stream_becomes_a_chat_body() -> None:
    status, body = assembled(
        delta(role="assistant", content=""), delta(content="Hel"), delta(content="lo", finish="stop"), USAGE
    )
    assert status == 200
    assert body == HEAD | {
        "object": "chat.completion",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hello", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": USAGE["usage"],
    }


def test_tool_calls_are_merged_by_index() -> None:
    def call(index: int, arguments: str, **more: Any) -> dict[str, Any]:
        function = {"arguments": arguments} | ({"name": more.pop("name")} if "name" in more else {})
        return {"index": index, "function": function, **more}

    _, body = assembled(
        delta(role="assistant", content=""),
        delta(tool_calls=[call(0, "", id="call_a", type="function", name="weather")]),
        delta(tool_calls=[call(0, '{"city":')]),
        delta(tool_calls=[call(0, ' "Rome"}'), call(1, "{}", id="call_b", type="function", name="time")]),
        delta(content="", finish="tool_calls"),
    )
    message = body["choices"][0]["message"]
    assert message["content"] is None
    assert message["tool_calls"] == [
        {"function": {"arguments": '{"city": "Rome"}', "name": "weather"}, "id": "call_a", "type": "function"},
        {"function": {"arguments": "{}", "name": "time"}, "id": "call_b", "type": "function"},
    ]
    assert body["choices"][0]["finish_reason"] == "tool_calls"


def test_legacy_function_call_is_concatenated() -> None:
    _, body = assembled(
        delta(role="assistant", function_call={"name": "f", "arguments": ""}),
        delta(function_call={"arguments": '{"a"'}),
        delta(function_call={"arguments": ":1}"}, finish="function_call"),
    )
    assert body["choices"][0]["message"]["function_call"] == {"name": "f", "arguments": '{"a":1}'}


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content", "refusal", "some_new_text"])
def test_text_fields_are_concatenated(name: str) -> None:
    _, body = assembled(delta(role="assistant", **{name: "a"}), delta(**{name: "b"}), delta(content="c"))
    assert body["choices"][0]["message"][name] == "ab"
    assert body["choices"][0]["message"]["content"] == "c"


def test_chat_logprobs_form_one_list() -> None:
    def with_logprob(text: str) -> dict[str, Any]:
        logprobs = {"content": [{"token": text, "logprob": -0.5, "top_logprobs": []}]}
        return {"choices": [{"index": 0, "delta": {"content": text}, "logprobs": logprobs, "finish_reason": None}]}

    _, body = assembled(delta(role="assistant", content=""), with_logprob("a"), with_logprob("b"), delta())
    assert [entry["token"] for entry in body["choices"][0]["logprobs"]["content"]] == ["a", "b"]


def test_text_completions_concatenate_text_and_logprob_lists() -> None:
    head = HEAD | {"object": "text_completion"}

    def piece(text: str, offset: int, finish: str | None = None) -> dict[str, Any]:
        logprobs = {"tokens": [text], "token_logprobs": [-1.0], "top_logprobs": [None], "text_offset": [offset]}
        choice = {"index": 0, "text": text, "logprobs": logprobs, "finish_reason": finish, "stop_reason": None}
        return {"choices": [choice]}

    _, body = assembled(piece("ab", 0), piece("c", 2, "length"), head=head)
    assert body["object"] == "text_completion"
    assert body["choices"] == [
        {
            "index": 0,
            "text": "abc",
            "logprobs": {
                "tokens": ["ab", "c"],
                "token_logprobs": [-1.0, -1.0],
                "top_logprobs": [None, None],
                "text_offset": [0, 2],
            },
            "finish_reason": "length",
            "stop_reason": None,
        }
    ]


def test_choices_are_sorted_and_keep_their_finish_reasons() -> None:
    stopped = {"choices": [{"index": 0, "delta": {"content": "a"}, "finish_reason": "stop", "stop_reason": "###"}]}
    _, body = assembled(delta(1, content="b", finish="length"), stopped)
    first, second = body["choices"]
    assert (first["message"]["content"], first["finish_reason"], first["stop_reason"]) == ("a", "stop", "###")
    assert (second["index"], second["message"]["content"], second["finish_reason"]) == (1, "b", "length")


def test_error_event_becomes_the_response() -> None:
    error = {"message": "engine died", "type": "InternalServerError", "code": 500}
    assert assembled(delta(content="a"), {"error": error}) == (500, {"error": error})
    assert assembled({"error": {"message": "bad", "code": 400}})[0] == 400
    assert assembled({"error": {"message": "odd", "code": "server_error"}})[0] == 500
    assert assembled({"error": {"message": "slow down", "code": "429"}})[0] == 429
    status, body = assembled({"error": "just text"})
    assert (status, body["error"]["message"]) == (500, "just text")


def test_truncated_stream_is_not_complete() -> None:
    assembler = Assembler()
    assert not assembler.complete
    assembler.add(ParsedEvent.of(b"data: %b\n\n" % orjson.dumps(HEAD | delta(content="a"))))
    assembler.add(ParsedEvent.of(b": comment\n\n"))
    assembler.add(ParsedEvent.of(b"data: {broken\n"))
    assert not assembler.complete


@pytest.mark.parametrize(
    ("body", "rebuildable"),
    [
        ({}, True),
        ({"n": 2, "logprobs": True, "tools": [{}]}, True),
        ({"echo": True}, True),
        ({"best_of": None, "use_beam_search": False}, True),
        ({"best_of": 2}, False),
        ({"prompt_logprobs": 0}, False),
        ({"echo": True, "logprobs": 1}, False),
        ({"return_token_ids": True}, False),
        ({"kv_transfer_params": {}}, False),
        ({"stream_options": {"include_usage": True}}, False),
    ],
)
def test_can_rebuild_rejects_unsupported_fields(body: dict[str, Any], rebuildable: bool) -> None:
    assert can_rebuild(body) is rebuildable


@pytest.mark.parametrize(
    ("event", "text"),
    [
        (b'data: {"choices": [{"delta": {"content": "a\0b"}}]}\n\n', "a\0b"),
        (b'data: {"choices": [{"delta": {"content": "a\tb"}}]}\n\n', "a\tb"),
        (b'data: {"choices": [{"delta": {"content": "a"}, "logprobs": {"content": [{"logprob": NaN}]}}]}\n\n', "a"),
        (b'data: {"choices": [{"delta": {"content": "a\xff"}}]}\n\n', "a\ufffd"),
    ],
)
def test_event_that_only_a_lenient_parser_accepts_is_not_lost(event: bytes, text: str) -> None:
    assembler = Assembler()
    for part in (event, b"data: [DONE]\n\n"):
        assembler.add(ParsedEvent.of(part))
    assert assembler.response()[1]["choices"][0]["message"]["content"] == text


@pytest.mark.parametrize("data", [b'{"choices": [', b'{"secret"}', b'{"a":' * 100_000])
def test_event_that_is_not_json_raises_without_quoting_it(data: bytes) -> None:
    with pytest.raises(UnreadableStream, match=r"^an event is not valid JSON$"):
        Assembler().add(ParsedEvent.of(b"data: " + data + b"\n\n"))


@pytest.mark.parametrize("event", [b"data: \0\n\n", b"data: ping\n\n", b"data:\n\n", b"retry: 3000\n\n"])
def test_event_without_an_object_is_skipped(event: bytes) -> None:
    assembler = Assembler()
    for part in (event, b"data: %b\n\n" % orjson.dumps(HEAD | delta(content="a", finish="stop"))):
        assembler.add(ParsedEvent.of(part))
    assert assembler.response()[1]["choices"][0]["message"]["content"] == "a"
