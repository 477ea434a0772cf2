"""Prompt text, size, limits and number of sequences, as read from a request's body."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from gateway.api.errors import ApiError
from gateway.api.prompt import Prompt, read_batch, read_chat, read_completion, read_messages, read_responses
from gateway.prompts.content import PromptContent
from gateway.prompts.size_model import PromptSizeModel


def tokens(prompt: Prompt) -> int:
    """Return the estimated size of ``prompt``."""
    return PromptSizeModel().tokens(prompt.features)


def a_chat(content: Any, **fields: Any) -> Prompt:
    return read_chat({"messages": [{"role": "user", "content": content}], **fields})


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("one two", "one two"),
        (None, ""),
        ([{"type": "text", "text": "one two"}, {"type": "image_url"}, "odd", {"text": 3}], "one two"),
    ],
)
def test_chat_text_for_the_predictor_is_that_of_the_last_user_message(content: Any, text: str) -> None:
    prompt = a_chat(content)
    assert (prompt.text, prompt.max_tokens, prompt.content.messages) == (text, None, 1)


def test_chat_text_skips_tool_results_and_messages_of_the_model() -> None:
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "first"},
        {"role": "user", "content": "question"},
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "tool", "content": "result", "tool_call_id": "1"},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x/y.png"}}]},
    ]
    assert read_chat({"messages": messages}).text == "question"


@pytest.mark.parametrize(
    ("prompt", "ids", "sequences"),
    [
        ("one two", None, 1),
        ("", None, 1),
        (["one", "one two three"], None, 2),
        ([5, 6, 7], [5, 6, 7], 1),
        ([[5], [6, 7]], [6, 7], 2),
        ([[]], [], 1),
    ],
)
def test_text_prompt_of_every_form_is_read(prompt: Any, ids: list[int] | None, sequences: int) -> None:
    read = read_completion({"prompt": prompt, "n": 2})
    assert (read.content.token_ids, read.sequences, read.max_tokens) == (ids, 2 * sequences, 16)


@pytest.mark.parametrize("prompt", [None, [], 5, [1, "a"], [True], [[1], ["a"]], [-1], [1 << 40], {"a": 1}])
def test_text_prompt_of_another_form_is_a_bad_request(prompt: Any) -> None:
    with pytest.raises(ApiError) as error:
        read_completion({"prompt": prompt})
    assert (error.value.status, error.value.param) == (400, "prompt")


@pytest.mark.parametrize("value", [16, 16.0, 1.6e1])
def test_whole_number_may_be_written_as_a_float(value: Any) -> None:
    prompt = a_chat("hi", max_tokens=value, min_tokens=value, n=value)
    assert (prompt.max_tokens, prompt.min_tokens, prompt.sequences) == (16, 16, 16)
    assert type(prompt.max_tokens) is int


@pytest.mark.parametrize("value", [16.5, -1.0, 1e30, float("inf"), float("nan")])
def test_float_that_is_no_whole_number_is_a_bad_request(value: float) -> None:
    with pytest.raises(ApiError) as error:
        a_chat("hi", max_tokens=value)
    assert (error.value.status, error.value.param) == (400, "max_tokens")


def test_max_completion_tokens_has_precedence_over_max_tokens() -> None:
    assert a_chat("hi", max_completion_tokens=7, max_tokens=9).max_tokens == 7
    assert a_chat("hi", max_tokens=9).max_tokens == 9


TOOL = {"type": "function", "function": {"name": "search", "description": "word " * 900, "parameters": {}}}
LONG = "word " * 900
PNG_64 = "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAABAAAAAQACAIAAADwf7zU"


@pytest.mark.parametrize(
    ("read", "body", "low", "high"),
    [
        (read_chat, {"messages": [{"role": "user", "content": "hi"}], "tools": [TOOL]}, 900, 1300),
        (read_chat, {"messages": [{"role": "user", "content": "hi"}], "functions": [TOOL["function"]]}, 900, 1300),
        (
            read_chat,
            {
                "messages": [
                    {"role": "user", "content": "hi"},
                    {
                        "role": "assistant",
                        "content": None,
                        "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": LONG}}],
                    },
                ]
            },
            900,
            1200,
        ),
        (
            read_chat,
            {"messages": [{"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": LONG}}]},
            900,
            1200,
        ),
        (
            read_chat,
            {
                "messages": [
                    {
                        "role": "assistant",
                        "content": None,
                        "tool_calls": [{"id": "1", "type": "custom", "custom": {"name": "f", "input": LONG}}],
                    }
                ]
            },
            900,
            1200,
        ),
        (
            read_chat,
            {"messages": [{"role": "developer", "content": LONG}, {"role": "user", "name": "ann", "content": []}]},
            900,
            1200,
        ),
        (
            read_chat,
            {"messages": [{"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": LONG}]}]},
            900,
            1200,
        ),
        (read_chat, {"messages": [{"role": "assistant", "content": "", "reasoning_content": LONG}]}, 900, 1200),
        (read_chat, {"messages": [{"role": "tool", "tool_call_id": "1", "content": LONG}]}, 900, 1200),
        (
            read_chat,
            {
                "messages": [{"role": "user", "content": "hi"}],
                "response_format": {"type": "json_schema", "json_schema": {"schema": {"description": LONG}}},
            },
            900,
            1200,
        ),
        (read_chat, {"messages": [{"role": "user", "content": "hi"}], "documents": [{"text": LONG}]}, 900, 1200),
        (
            read_chat,
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": PNG_64}}]}]},
            1300,
            1400,
        ),
        (
            read_chat,
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "http://x/y.jpg"}]}]},
            800,
            1200,
        ),
        (
            read_chat,
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "input_audio", "input_audio": {"data": "A" * 426_667, "format": "wav"}}],
                    }
                ]
            },
            240,
            280,
        ),
        (read_messages, {"system": LONG, "messages": [{"role": "user", "content": "hi"}]}, 900, 1200),
        (
            read_messages,
            {"system": [{"type": "text", "text": LONG}], "messages": [{"role": "user", "content": "hi"}]},
            900,
            1200,
        ),
        (
            read_messages,
            {
                "messages": [
                    {"role": "assistant", "content": [{"type": "tool_use", "name": "f", "input": {"q": LONG}}]},
                    {"role": "user", "content": [{"type": "tool_result", "content": [{"type": "text", "text": "x"}]}]},
                ]
            },
            900,
            1200,
        ),
        (
            read_messages,
            {"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": LONG}]}]},
            900,
            1200,
        ),
        (
            read_messages,
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {
                                "type": "image",
                                "source": {"type": "base64", "media_type": "image/png", "data": PNG_64.split(",")[1]},
                            }
                        ],
                    }
                ]
            },
            1300,
            1400,
        ),
        (read_responses, {"input": LONG}, 900, 1200),
        (read_responses, {"input": "hi", "instructions": LONG}, 900, 1200),
        (read_responses, {"input": "hi", "tools": [{"type": "function", "name": "f", "description": LONG}]}, 900, 1300),
        (read_responses, {"input": [{"role": "user", "content": [{"type": "input_text", "text": LONG}]}]}, 900, 1200),
        (read_responses, {"input": [{"type": "function_call", "name": "f", "arguments": LONG}]}, 900, 1200),
        (read_responses, {"input": [{"type": "function_call_output", "call_id": "1", "output": LONG}]}, 900, 1200),
        (
            read_responses,
            {"input": [{"type": "reasoning", "summary": [{"type": "summary_text", "text": LONG}]}]},
            900,
            1200,
        ),
        (
            read_responses,
            {"input": "hi", "text": {"format": {"type": "json_schema", "schema": {"description": LONG}}}},
            900,
            1200,
        ),
    ],
)
def test_every_piece_of_a_prompt_is_counted(
    read: Callable[[dict[str, Any]], Prompt], body: dict[str, Any], low: int, high: int
) -> None:
    assert low <= tokens(read(body)) <= high


BASE64 = "JVBERi0xLjcK" * 25_000
"""300 kB of binary data. Counted as text it would be more than 200,000 tokens."""


@pytest.mark.parametrize(
    ("read", "part"),
    [
        (
            read_chat,
            {"type": "file", "file": {"filename": "a.pdf", "file_data": "data:application/pdf;base64," + BASE64}},
        ),
        (read_chat, {"type": "file", "file": {"filename": "a.pdf", "file_data": BASE64}}),
        (read_chat, {"type": "image_embeds", "image_embeds": BASE64}),
        (read_chat, {"type": "image_url", "image_url": "data:image/png;base64," + BASE64}),
        (read_chat, {"image_url": {"url": "data:image/png;base64," + BASE64}}),
        (read_messages, {"type": "redacted_thinking", "data": BASE64}),
        (read_messages, {"type": "web_search_tool_result", "content": [{"title": "x", "encrypted_content": BASE64}]}),
        (read_responses, {"type": "input_file", "filename": "a.pdf", "file_data": "data:a/b;base64," + BASE64}),
        (read_responses, {"type": "input_image", "detail": "auto", "image_url": "data:image/png;base64," + BASE64}),
    ],
)
def test_binary_data_of_a_part_is_not_counted_as_text(read: Callable[[dict[str, Any]], Prompt], part: Any) -> None:
    message = {"role": "user", "content": [part, {"type": "text", "text": LONG}]}
    assert 900 <= tokens(read({"messages": [message], "input": [message]})) <= 2500


@pytest.mark.parametrize(
    "item",
    [
        {"type": "computer_call_output", "output": {"type": "computer_screenshot", "image_url": "data:," + BASE64}},
        {"type": "computer_call_output", "output": {"type": "input_image", "image_url": "data:i;base64," + BASE64}},
        {"type": "function_call_output", "output": [{"type": "input_image", "image_url": "data:i;base64," + BASE64}]},
        {"type": "image_generation_call", "id": "1", "result": BASE64},
        {"type": "reasoning", "summary": [], "encrypted_content": BASE64},
    ],
)
def test_binary_data_of_an_item_is_not_counted_as_text(item: dict[str, Any]) -> None:
    assert tokens(read_responses({"input": [item]})) <= 1500


def test_long_words_of_unknown_parts_are_text() -> None:
    text = "a,b;" * 1000
    assert tokens(a_chat([{"type": "unknown", "value": text}])) > 1000


@pytest.mark.parametrize(
    ("text", "low", "high"),
    [
        ("你好世界" * 1000, 3500, 4500),
        ("こんにちは" * 800, 3500, 4500),
        ("a" * 4096 + " w" * 6000, 5000, 7000),
        ("1234567890" * 100, 300, 1000),
        ("{}[]();" * 300, 300, 2100),
    ],
)
def test_size_follows_the_script_of_the_text(text: str, low: int, high: int) -> None:
    assert low <= tokens(a_chat(text)) <= high


@pytest.mark.parametrize(
    ("read", "body", "param"),
    [
        (read_chat, {}, "messages"),
        (read_chat, {"messages": ["hi"]}, "messages[0]"),
        (read_chat, {"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        (read_messages, {"messages": []}, "messages"),
        (read_messages, {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 0}, "max_tokens"),
        (read_responses, {}, "input"),
        (read_responses, {"input": [5]}, "input[0]"),
        (read_responses, {"input": "hi", "max_output_tokens": "many"}, "max_output_tokens"),
        (read_responses, {"input": "hi", "stream": "yes"}, "stream"),
        (read_chat, {"messages": [{"role": "user", "content": "hi"}], "n": 257}, "n"),
        (read_chat, {"messages": [{"role": "user", "content": "hi"}], "best_of": 400}, "best_of"),
        (read_completion, {"prompt": ["a", "b"], "n": 129}, "n"),
    ],
)
def test_malformed_bodies_name_the_field(
    read: Callable[[dict[str, Any]], Prompt], body: dict[str, Any], param: str
) -> None:
    with pytest.raises(ApiError) as error:
        read(body)
    assert (error.value.status, error.value.param) == (400, param)


@pytest.mark.parametrize(
    "content",
    [
        [{"type": "image_url", "image_url": None}],
        [{"type": "image", "source": "x"}],
        [{"type": "input_audio", "input_audio": "x"}],
        [{"type": "video_url", "video_url": {}}],
        [{"type": "tool_use"}],
        [{"type": "reasoning", "summary": 5}],
        [{"type": {}}, 5, None, [[[[[["deep"]]]]]]],
        "half a surrogate pair \ud83d",
    ],
)
def test_odd_parts_are_left_to_the_engine(content: Any) -> None:
    assert tokens(a_chat(content)) >= 1


def test_tools_of_a_batch_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading them for each of 256 chats took 256 times the memory of the body."""
    read: list[object] = []
    monkeypatch.setattr(PromptContent, "add_tool", lambda content, tool: read.append(tool))
    chats = [[{"role": "user", "content": "x" * n}] for n in range(1, 256)]
    prompt = read_batch({"tools": [{"name": "f"}], "messages": chats})
    assert (len(read), prompt.sequences, prompt.text) == (1, 255, "x" * 255)
