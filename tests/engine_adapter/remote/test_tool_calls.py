"""Tool calls of other servers, assembled as clients do, and streams that no client could read."""

from __future__ import annotations

import tracemalloc
from typing import Any

import orjson
import pytest

from engine_adapter.remote.tool_calls import ToolCalls, UnreadableStream
from tests.fixtures.live_server import Recorder
from tests.fixtures.scripted_server import CHAT, DONE, ScriptedStream, ask, chunk, proxied, usage_chunk

MISSING = object()


def part(arguments: Any = "", *, index: Any = MISSING, name: str | None = None, **fields: Any) -> dict[str, Any]:
    """One delta of a tool call."""
    function = {"arguments": arguments} | ({} if name is None else {"name": name})
    return fields | {"function": function} | ({} if index is MISSING else {"index": index})


def assembled(*parts: Any) -> list[tuple[Any, Any, Any]]:
    """(id, name, arguments) of the calls that ``parts`` make."""
    calls = ToolCalls()
    for given in parts:
        calls.add(given if isinstance(given, list) else [given])
    found = [
        (call.get("id"), call["function"].get("name"), call["function"]["arguments"]) for call in calls.assembled()
    ]
    assert all("index" not in call for call in calls.assembled())
    return found


F, G = ("a", "f", '{"x":1}'), ("b", "g", '{"y":2}')


def test_deltas_without_index_continue_the_last_call() -> None:
    assert assembled(part(id="a", name="f", index=0), part('{"x"'), part(":1}")) == [F]
    assert assembled(part(id="a", name="f"), part('{"x"'), part(":1}")) == [F]


def test_same_index_with_other_ids_are_parallel_calls() -> None:
    whole = [part('{"x":1}', index=0, id="a", name="f"), part('{"y":2}', index=0, id="b", name="g")]
    assert assembled(*whole) == assembled(whole) == [F, G]


def test_parallel_calls_with_one_index_may_interleave_by_id() -> None:
    parts = [part(index=0, id="a", name="f"), part(index=0, id="b", name="g")]
    parts += [part('{"x"', index=0, id="a"), part('{"y"', index=0, id="b")]
    parts += [part(":1}", index=0, id="a"), part(":2}", index=0, id="b")]
    assert assembled(*parts) == [F, G]


@pytest.mark.parametrize("index", [None, "0", "", 0.0, MISSING, -1, 10**9, "123456789012"])
def test_odd_indices_are_tolerated(index: Any) -> None:
    assert assembled(part(index=index, id="a", name="f"), part('{"x":1}', index=index)) == [F]


def test_calls_are_ordered_by_index() -> None:
    assert assembled(part('{"y":2}', index=1, id="b", name="g"), part('{"x":1}', index="0", id="a", name="f")) == [F, G]


def test_whole_calls_without_ids_and_index_are_separate() -> None:
    assert assembled(part('{"x":1}', name="f"), part('{"x":2}', name="f"), part("{}", name="g")) == [
        (None, "f", '{"x":1}'),
        (None, "f", '{"x":2}'),
        (None, "g", "{}"),
    ]


def test_id_and_name_repeated_with_every_part_make_one_call() -> None:
    parts = [part(text, index=0, id="a", name="f") for text in ('{"x"', ":1", "}", "")]
    assert assembled(*parts) == [F]
    assert assembled(*({key: v for key, v in p.items() if key != "id"} for p in parts)) == [(None, "f", '{"x":1}')]


def test_new_id_without_a_name_continues_the_call() -> None:
    assert assembled(part('{"x"', index=0, id="a", name="f"), part(":1}", index=0, id="z")) == [F]


@pytest.mark.parametrize("arguments", [{"x": 1}, '{"x":1}'])
def test_arguments_may_be_an_object(arguments: Any) -> None:
    assert assembled(part(arguments, index=0, id="a", name="f")) == [F]


def test_empty_object_is_a_placeholder_or_no_arguments() -> None:
    assert assembled(part({}, index=0, id="a", name="f"), part('{"x":1}', index=0)) == [F]
    assert assembled(part({}, index=0, id="a", name="f"), part(None, index=0)) == [("a", "f", "{}")]


def test_single_call_may_come_without_its_list() -> None:
    calls = ToolCalls()
    calls.add(part('{"x":1}', id="a", name="f"))
    assert len(calls.assembled()) == 1


@pytest.mark.parametrize(
    "bad",
    [
        part(index=[]),
        part(index={}),
        part(index=1.5),
        part(index="one"),
        part(index=True),
        part(5),
        part(True),
        {"function": "f"},
        "text",
        None,
    ],
)
def test_unreadable_deltas_raise_one_error(bad: Any) -> None:
    with pytest.raises(UnreadableStream):
        ToolCalls().add([bad])


def test_huge_indices_allocate_nothing_and_calls_are_bounded() -> None:
    tracemalloc.start()
    calls = ToolCalls()
    for index in (10**9, 2**62, 10**15):
        calls.add([part(index=index, id=str(index), name="f")])
    assert tracemalloc.get_traced_memory()[1] < 100_000
    tracemalloc.stop()
    with pytest.raises(UnreadableStream, match="more than"):
        calls.add([part(index=i, id=f"c{i}", name="f") for i in range(5000)])


async def test_tool_calls_are_whole_in_the_response_to_a_plain_request() -> None:
    first = chunk(role="assistant", tool_calls=[part(index=0, id="a", type="function", name="f")])
    stream = [first, chunk(tool_calls=[part('{"x"')]), chunk(tool_calls=[part(":1}", index=None)])]
    recorder = Recorder()
    async with proxied(ScriptedStream([*stream, chunk(finish="tool_calls"), usage_chunk(9), DONE]), recorder) as (_, c):
        message = (await c.post(CHAT, json=ask(tools=[{"type": "function"}]))).json()["choices"][0]["message"]
    call = {"function": {"arguments": '{"x":1}', "name": "f"}, "id": "a", "type": "function"}
    assert (message["tool_calls"], message["content"]) == ([call], None)
    assert recorder.count() == 9


F_CALL = {"function": {"arguments": '{"x":1}', "name": "f"}, "id": "a", "type": "function"}
G_CALL = {"function": {"arguments": '{"y":2}', "name": "g"}, "id": "b", "type": "function"}


@pytest.mark.parametrize(
    ("deltas", "calls"),
    [
        (
            [
                [part('{"x":1}', index=0, id="a", type="function", name="f")],
                [part('{"y":2}', index=0, id="b", type="function", name="g")],
            ],
            [F_CALL, G_CALL],
        ),
        (
            [
                [
                    part(index=0, id="a", type="function", name="f"),
                    part(index=1, id="b", type="function", name="g"),
                ],
                [part('{"y"', index=1), part('{"x"', index=0)],
                [part(":1}", index=0)],
                [part(":2}", index=1)],
            ],
            [F_CALL, G_CALL],
        ),
        ([[part({"x": 1}, index=0, id="a", type="function", name="f")]], [F_CALL]),
        ([[part(index="0", id="a", type="function", name="f")], [part('{"x":1}', index="0")]], [F_CALL]),
        ([[part(index=None, id="a", type="function", name="f")], [part('{"x":1}', index=None)]], [F_CALL]),
        (
            [[], [part(index=0, id="a", type="function", name="f")], [part('{"x":1}', index=0, id="", name="")], None],
            [F_CALL],
        ),
    ],
    ids=["same index", "interleaved", "object", "text index", "null index", "empty lists and names"],
)
async def test_odd_deltas_make_whole_calls_in_the_response_to_a_plain_request(deltas: Any, calls: Any) -> None:
    stream = [chunk(tool_calls=delta) for delta in deltas]
    async with proxied(ScriptedStream([*stream, chunk(finish="tool_calls"), usage_chunk(9), DONE])) as (_, client):
        response = await client.post(CHAT, json=ask(tools=[{"type": "function"}]))
    (choice,) = response.json()["choices"]
    assert (choice["message"]["tool_calls"], choice["finish_reason"]) == (calls, "tool_calls")


def event(**fields: Any) -> bytes:
    return b"data: %b\n\n" % orjson.dumps(fields)


@pytest.mark.parametrize(
    "bad",
    [
        chunk(tool_calls=[part(index=[])]),
        chunk(tool_calls="f"),
        chunk(tool_calls=5),
        chunk(function_call="f"),
        chunk(function_call={"arguments": 3}),
        event(choices=["text"]),
        event(choices={"index": 0}),
        event(choices=5),
        event(choices=[{"index": 0, "delta": "text"}]),
        event(choices=[{"index": 0, "delta": [1]}]),
        event(choices=[{"index": "zero", "delta": {}}]),
        event(choices=[{"index": -1, "delta": {}}]),
        event(choices=[{"index": 1e300, "delta": {}}]),
        event(choices=[{"index": [1], "delta": {}}]),
        event(choices=[{"index": 0, "text": 5}, {"index": 0, "text": "a"}]),
        event(object=["chat.completion.chunk"]) + event(choices=5),
        b'data: {"choices": [{"index": 0, "delta": {"x": ' + b"[" * 400 + b"]" * 400 + b"}}]}\n\n",
        event(choices=[{"index": i, "delta": {}} for i in range(5000)]),
    ],
)
async def test_unreadable_stream_is_a_502_naming_the_engine(bad: bytes) -> None:
    async with proxied(ScriptedStream([chunk("a"), bad, chunk("secret", "stop"), DONE])) as (_, client):
        response = await client.post(CHAT, json=ask())
        assert response.status_code == 502
        assert "engine remote" in response.json()["error"]["message"]
        assert "secret" not in response.text
        # A stream passes through: the client may know this form.
        assert (await client.post(CHAT, json=ask(stream=True))).status_code == 200


async def test_stream_with_nothing_but_done_is_a_502_for_a_plain_request() -> None:
    async with proxied(ScriptedStream([DONE])) as (_, client):
        assert (await client.post(CHAT, json=ask())).status_code == 502


@pytest.mark.parametrize("index", [None, "0", 0.0])
async def test_odd_choice_index_is_the_first_choice(index: Any) -> None:
    choice = {"index": index, "delta": {"content": "a"}, "finish_reason": "stop"}
    async with proxied(ScriptedStream([event(choices=[choice]), DONE])) as (_, client):
        (found,) = (await client.post(CHAT, json=ask())).json()["choices"]
    assert (found["index"], found["message"]["content"]) == (0, "a")
