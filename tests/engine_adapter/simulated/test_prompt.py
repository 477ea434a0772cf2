"""The tokens of a prompt, and the hashes of its blocks."""

from __future__ import annotations

from typing import Any

import pytest

from engine_adapter.simulated.prompt import MEDIA_TOKENS, block_hashes, chat_prompt, text_tokens

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "answer", "schema": {"type": "object"}}}


def size(*messages: dict[str, Any], **body: Any) -> int:
    return chat_prompt(body, list(messages)).size


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("", 0),
        (" two  words ", 2),
        ("internationalise", 1),
        ("internationalised", 5),
        ("a" * 4096 + " w" * 6000, 1024 + 6000),
        ("日本語" * 4, 9),
        ("日本", 1),
        ("\ud800" * 6, 5),
    ],
)
def test_word_is_a_token_and_a_long_word_one_for_each_four_bytes(text: str, tokens: int) -> None:
    assert len(text_tokens(text)) == tokens


def test_text_parts_count_like_one_text() -> None:
    assert size(user("one two three")) == 3
    assert size(user([{"type": "text", "text": "one two"}, {"type": "text", "text": "three"}])) == 3


@pytest.mark.parametrize("body", [{"tools": [TOOL] * 40}, {"functions": [TOOL] * 40}, {"response_format": SCHEMA}])
def test_tools_and_response_formats_count_as_json(body: dict[str, Any]) -> None:
    json_bytes = len(str(body[next(iter(body))]).replace(" ", ""))
    assert size(user("hello"), **body) == pytest.approx(1 + json_bytes / 4, rel=0.05)


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"arguments": "x" * 30_000}}]},
        {"role": "assistant", "content": "", "reasoning_content": "x" * 30_000},
        {"role": "tool", "tool_call_id": "1", "content": "x" * 30_000},
        {"role": "user", "content": [{"type": "tool_result", "content": [{"type": "text", "text": "x" * 30_000}]}]},
        {"type": "function_call_output", "output": "x" * 30_000},
    ],
)
def test_tool_history_and_reasoning_count(message: dict[str, Any]) -> None:
    assert size(user("hello"), message) == pytest.approx(7500, abs=30)


def test_each_image_counts_a_fixed_number() -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 100_000}}
    assert size(user([{"type": "text", "text": "what is this"}, image, image])) == 3 + 2 * MEDIA_TOKENS


def test_equal_prefix_has_equal_hashes_until_the_first_difference() -> None:
    long = [f"word{number}" for number in range(100)]
    other = [*long[:40], "different", *long[41:]]
    first, second = block_hashes("root", long), block_hashes("root", other)
    assert len(first) == len(second) == 6
    assert first[:2] == second[:2]
    assert not set(first[2:]) & set(second[2:]), "every later block differs, although its own tokens are equal"
    assert not set(first) & set(block_hashes("another root", long))


def test_role_and_image_content_are_part_of_the_prefix() -> None:
    def hashes(*messages: dict[str, Any]) -> tuple[int, ...]:
        return block_hashes("", chat_prompt({}, list(messages)).tokens)

    def image(url: str) -> dict[str, Any]:
        return user([{"type": "image_url", "image_url": {"url": url}}])

    text = "w " * 40
    assert hashes(user(text)) != hashes({"role": "system", "content": text})
    assert hashes(image("a")) != hashes(image("b"))
    assert hashes(image("a")) == hashes(image("a"))
