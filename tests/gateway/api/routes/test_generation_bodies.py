"""Bodies of every generation route: the same prompt counts the same, and no body raises anything but a 400."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.api.errors import ApiError
from gateway.api.prompt import Prompt
from gateway.api.routes.generation import BATCH, CHAT, GENERATION_ROUTES, MESSAGES, RESPONSES, GenerationRoute
from gateway.prompts.size_model import PromptSizeModel

SCHEMA = {"type": "object", "properties": {"city": {"type": "string", "description": "the city " * 50}}}
ARGUMENTS = '{"city":"' + "Paris " * 200 + '"}'
RESULT = "sunny, with some clouds " * 100


def tokens(prompt: Prompt) -> int:
    return PromptSizeModel().tokens(prompt.features)


AGENT = {
    CHAT: {
        "messages": [
            {"role": "system", "content": "You are a helpful agent."},
            {"role": "user", "content": "How is the weather?"},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {"id": "t", "type": "function", "function": {"name": "weather", "arguments": ARGUMENTS}}
                ],
            },
            {"role": "tool", "tool_call_id": "t", "content": RESULT},
        ],
        "tools": [{"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}],
    },
    RESPONSES: {
        "instructions": "You are a helpful agent.",
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "How is the weather?"}]},
            {"type": "function_call", "call_id": "t", "name": "weather", "arguments": ARGUMENTS},
            {"type": "function_call_output", "call_id": "t", "output": RESULT},
        ],
        "tools": [{"type": "function", "name": "weather", "parameters": SCHEMA}],
    },
    MESSAGES: {
        "max_tokens": 9,
        "system": "You are a helpful agent.",
        "messages": [
            {"role": "user", "content": "How is the weather?"},
            {
                "role": "assistant",
                "content": [{"type": "tool_use", "id": "t", "name": "weather", "input": {"city": "Paris " * 200}}],
            },
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": RESULT}]},
        ],
        "tools": [{"name": "weather", "input_schema": SCHEMA}],
    },
}


@pytest.mark.parametrize("route", [RESPONSES, MESSAGES], ids=lambda route: route.path)
def test_agent_prompt_counts_as_in_a_chat(route: GenerationRoute) -> None:
    chat, prompt = CHAT.read_prompt(AGENT[CHAT]), route.read_prompt(AGENT[route])
    assert tokens(prompt) == pytest.approx(tokens(chat), rel=0.1)
    assert prompt.text == chat.text == "How is the weather?"


def test_responses_continuation_without_input_is_read() -> None:
    prompt = RESPONSES.read_prompt({"input": [], "previous_response_id": "resp_1", "max_output_tokens": 5})
    assert (prompt.text, prompt.max_tokens, prompt.sequences) == ("", 5, 1)


def test_batch_counts_its_longest_conversation() -> None:
    chats = [[{"role": "user", "content": "word " * words}] for words in (3, 500, 7)]
    prompt = BATCH.read_prompt({"messages": chats, "max_tokens": 5})
    assert (prompt.sequences, prompt.max_tokens) == (3, 5)
    assert tokens(prompt) == tokens(CHAT.read_prompt({"messages": chats[1]}))


KEYS = (
    "role", "content", "type", "text", "input", "output", "name", "arguments", "source", "image_url", "summary",
    "thinking", "system", "messages", "instructions", "tools", "format", "input_schema", "parameters", "max_tokens",
    "max_output_tokens", "stream", "model", "output_config", "background", "n", "prompt", "documents", "tool_calls",
    "function", "data", "url",
)  # fmt: skip
TYPES = (
    "message", "function_call", "function_call_output", "reasoning", "input_image", "image", "tool_use", "tool_result",
    "thinking", "function", "user", "assistant", "text", "image_url", "base64",
)  # fmt: skip
LEAVES = st.none() | st.booleans() | st.integers(-2, 300) | st.floats(allow_nan=False) | st.sampled_from(TYPES)
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=5)
)
BODIES = st.dictionaries(st.sampled_from(KEYS), VALUES)


@pytest.mark.parametrize("route", GENERATION_ROUTES, ids=lambda route: route.path)
@given(body=BODIES)
def test_any_body_is_read_or_gets_400(route: GenerationRoute, body: dict[str, Any]) -> None:
    try:
        assert tokens(route.read_prompt(body)) >= 1
    except ApiError as error:
        assert (error.status, bool(error.message)) == (400, True)


@pytest.mark.parametrize("route", GENERATION_ROUTES, ids=lambda route: route.path)
def test_body_that_nests_deeply_is_read_or_gets_400(route: GenerationRoute) -> None:
    deep: Any = {}
    for _ in range(1000):
        deep = {"a": deep}
    block = {"type": "tool_use", "name": "f", "input": deep}
    message = {"role": "assistant", "content": [block]}
    body = {"messages": [message], "input": [message, block], "prompt": [deep], "tools": [{"parameters": deep}]}
    for document in (body, {**body, "messages": [[message]]}):
        try:
            assert tokens(route.read_prompt(document)) >= 1
        except ApiError as error:
            assert error.status == 400
