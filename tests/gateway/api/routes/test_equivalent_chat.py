"""Bodies of the Responses and the Messages API as the chat of the same prompt."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.api.errors import ApiError
from gateway.api.prompt import Prompt
from gateway.api.routes.equivalent_chat import chat_of_messages, chat_of_responses
from gateway.api.routes.generation import BATCH, MESSAGES, RESPONSES, GenerationRoute

TOOL = {"name": "weather", "description": "The weather.", "parameters": {"type": "object", "properties": {}}}


def turns_of(*items: Any, **fields: Any) -> Any:
    return chat_of_responses({"input": list(items), **fields})["messages"]


def test_responses_text_and_instructions_are_user_and_system_messages() -> None:
    assert chat_of_responses({"model": "m", "input": "hi", "instructions": "be short", "max_output_tokens": 9}) == {
        "model": "m",
        "messages": [{"role": "system", "content": "be short"}, {"role": "user", "content": "hi"}],
        "max_completion_tokens": 9,
    }


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        ({"role": "user", "content": "hi"}, {"role": "user", "content": "hi"}),
        (
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}]},
            {"role": "user", "content": [{"type": "text", "text": "hi"}]},
        ),
        (
            {"role": "assistant", "content": [{"type": "output_text", "text": "yes", "annotations": []}]},
            {"role": "assistant", "content": [{"type": "text", "text": "yes"}]},
        ),
        (
            {"role": "user", "content": [{"type": "input_image", "image_url": "data:x", "detail": "low"}]},
            {
                "role": "user",
                "content": [{"type": "image_url", "image_url": {"url": "data:x", "detail": "low"}}],
            },
        ),
        (
            {"type": "function_call", "call_id": "c", "name": "weather", "arguments": '{"city": "Paris"}'},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}],
            },
        ),
        ({"type": "function_call_output", "call_id": "c", "output": "sun"}, {"role": "tool", "content": "sun"}),
        (
            {"type": "function_call_output", "output": [{"type": "input_text", "text": "sun"}]},
            {"role": "tool", "content": [{"type": "text", "text": "sun"}]},
        ),
        (
            {"type": "reasoning", "summary": [{"text": "so"}], "content": [{"type": "reasoning_text", "text": "as"}]},
            {"role": "assistant", "reasoning_content": "as\nso"},
        ),
        ({"type": "reasoning", "summary": None, "content": None}, {"role": "assistant", "reasoning_content": ""}),
        (
            {"type": "web_search_call", "id": "w"},
            {"role": "assistant", "content": '{"type":"web_search_call","id":"w"}'},
        ),
        ({"role": "user", "content": [None, 5, {"type": "input_text", "text": 5}]}, None),
    ],
)
def test_responses_item_is_the_message_of_the_same_size(item: Any, expected: Any) -> None:
    (message,) = turns_of(item)
    assert expected is None or message == expected


def test_responses_tools_and_schema_are_those_of_a_chat() -> None:
    form = {"type": "json_schema", "name": "answer", "schema": {"type": "object"}}
    chat = chat_of_responses(
        {"input": "hi", "tools": [{"type": "function", **TOOL}, {"type": "web_search"}], "text": {"format": form}}
    )
    assert chat["tools"] == [{"type": "function", "function": TOOL}, {"type": "web_search"}]
    assert chat["response_format"] == {"type": "json_schema", "json_schema": form}


@pytest.mark.parametrize("fields", [{"tools": "x"}, {"text": 5}, {"text": {"format": 5}}, {"tools": [5]}])
def test_responses_members_of_a_wrong_type_are_left_to_the_engine(fields: dict[str, Any]) -> None:
    assert turns_of({"role": "user", "content": "hi"}, **fields) == [{"role": "user", "content": "hi"}]


def test_responses_continuation_without_input_has_an_empty_message() -> None:
    prompt = RESPONSES.read_prompt({"input": [], "previous_response_id": "resp_1", "max_output_tokens": 5})
    assert (prompt.text, prompt.max_tokens, prompt.sequences) == ("", 5, 1)


def test_messages_blocks_are_parts_calls_and_tool_messages() -> None:
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}
    linked = {"type": "image", "source": {"type": "url", "url": "https://x/y.png"}}
    chat = chat_of_messages(
        {
            "model": "m",
            "max_tokens": 9,
            "system": [{"type": "text", "text": "be short", "cache_control": {"type": "ephemeral"}}],
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "look"}, image, linked]},
                {
                    "role": "assistant",
                    "content": [
                        {"type": "thinking", "thinking": "hmm", "signature": "s"},
                        {"type": "text", "text": "I ask."},
                        {"type": "tool_use", "id": "t", "name": "weather", "input": {"city": "Paris"}},
                    ],
                },
                {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": "sun"}]},
                {
                    "role": "user",
                    "content": [
                        {"type": "tool_result", "tool_use_id": "u", "content": [{"type": "text", "text": "rain"}]},
                        {"type": "text", "text": "and now?"},
                    ],
                },
            ],
            "tools": [{"name": "weather", "description": "The weather.", "input_schema": {"type": "object"}}],
        }
    )
    call = {"type": "function", "function": {"name": "weather", "arguments": '{"city":"Paris"}'}}
    assert chat["messages"] == [
        {"role": "system", "content": [{"type": "text", "text": "be short"}]},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "look"},
                {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
                {"type": "image_url", "image_url": {"url": "https://x/y.png"}},
            ],
        },
        {
            "role": "assistant",
            "content": [{"type": "text", "text": "I ask."}],
            "tool_calls": [call],
            "reasoning_content": "hmm",
        },
        {"role": "tool", "content": "sun"},
        {"role": "tool", "content": [{"type": "text", "text": "rain"}]},
        {"role": "user", "content": [{"type": "text", "text": "and now?"}]},
    ]
    (tool,) = chat["tools"]
    assert (tool["type"], tool["function"]["parameters"]) == ("function", {"type": "object"})
    assert (chat["model"], chat["max_completion_tokens"]) == ("m", 9)


def test_messages_prompt_gives_the_predictor_the_last_user_text() -> None:
    prompt = MESSAGES.read_prompt(
        {
            "max_tokens": 7,
            "messages": [
                {"role": "user", "content": "first"},
                {"role": "assistant", "content": "yes"},
                {"role": "user", "content": [{"type": "text", "text": "second"}]},
                {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": "sun"}]},
            ],
        }
    )
    assert (prompt.text, prompt.max_tokens) == ("second", 7)


@pytest.mark.parametrize(
    "content", [[], [5, None], [{"type": "tool_result"}], [{"type": "tool_use"}], [{"type": "image", "source": None}]]
)
def test_messages_odd_blocks_are_left_to_the_engine(content: list[Any]) -> None:
    assert MESSAGES.read_prompt({"messages": [{"role": "user", "content": content}]}).sequences == 1


KEYS = (
    "role", "content", "type", "text", "input", "output", "name", "arguments", "source", "image_url", "summary",
    "thinking", "system", "messages", "instructions", "tools", "format", "input_schema", "parameters", "max_tokens",
    "max_output_tokens", "stream", "model", "output_config", "background", "n",
)  # fmt: skip
TYPES = (
    "message", "function_call", "function_call_output", "reasoning", "input_image", "image", "tool_use", "tool_result",
    "thinking", "function", "user", "assistant",
)  # fmt: skip
LEAVES = st.none() | st.booleans() | st.integers(-2, 300) | st.floats(allow_nan=False) | st.sampled_from(TYPES)
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=5)
)
BODIES = st.dictionaries(st.sampled_from(KEYS), VALUES)


@pytest.mark.parametrize("route", [RESPONSES, MESSAGES, BATCH], ids=lambda route: route.path)
@given(body=BODIES)
def test_any_body_is_read_or_gets_400(route: GenerationRoute, body: dict[str, Any]) -> None:
    try:
        assert isinstance(route.read_prompt(body), Prompt)
    except ApiError as error:
        assert (error.status, bool(error.message)) == (400, True)


def test_body_that_nests_too_deeply_gets_400() -> None:
    deep: Any = {}
    for _ in range(300):
        deep = {"a": deep}
    with pytest.raises(ApiError) as caught:
        chat_of_messages({"messages": [{"role": "assistant", "content": [{"type": "tool_use", "input": deep}]}]})
    assert (caught.value.status, caught.value.code) == (400, "invalid_json")
