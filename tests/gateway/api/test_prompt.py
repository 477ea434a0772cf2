"""Prompt text, prompt length and limits, as read from a request's body."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.api.prompt import SAMPLE_CHARS, Prompt, read_prompt


def count_words(text: str) -> int:
    return len(text.split())


def read_chat(content: Any, **fields: Any) -> Prompt:
    return read_prompt({"messages": [{"role": "user", "content": content}], **fields}, chat=True)


def read_text(prompt: Any, **fields: Any) -> Prompt:
    return read_prompt({"prompt": prompt, **fields}, chat=False)


@pytest.mark.parametrize(
    ("content", "text", "tokens"),
    [
        ("one two", "one two", 2),
        (None, "", 0),
        ([{"type": "text", "text": "one two"}, {"type": "image_url"}, "odd", {"text": 3}], "one two", 2),
    ],
)
def test_chat_tokens_are_its_text_plus_four_per_message(content: Any, text: str, tokens: int) -> None:
    prompt = read_chat(content)
    assert (prompt.text, prompt.tokens(count_words), prompt.max_tokens) == (text, tokens + 4, None)


@pytest.mark.parametrize(
    ("prompt", "tokens", "sequences"),
    [
        ("one two", 2, 1),
        ("", 1, 1),
        (["one", "one two three"], 3, 2),
        ([5, 6, 7], 3, 1),
        ([[5], [6, 7]], 2, 2),
        ([[]], 1, 1),
    ],
)
def test_text_prompt_of_every_form_is_counted(prompt: Any, tokens: int, sequences: int) -> None:
    read = read_text(prompt, n=2)
    assert (read.tokens(count_words), read.sequences, read.max_tokens) == (tokens, 2 * sequences, 16)


def test_max_completion_tokens_has_precedence_over_max_tokens() -> None:
    assert read_chat("hi", max_completion_tokens=7, max_tokens=9).max_tokens == 7
    assert read_chat("hi", max_tokens=9).max_tokens == 9


def test_long_prompt_is_counted_by_a_sample() -> None:
    lengths: list[int] = []

    def count(text: str) -> int:
        lengths.append(len(text))
        return len(text) // 4

    assert read_text("x" * 10 * SAMPLE_CHARS).tokens(count) == 10 * SAMPLE_CHARS // 4
    assert lengths == [SAMPLE_CHARS]


def test_prompt_without_tokenizer_counts_four_characters_per_token() -> None:
    prompt = read_text("x" * 100)
    assert prompt.tokens(lambda text: None) == prompt.estimated_tokens == 25
