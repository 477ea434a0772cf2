"""What scheduling reads out of a body."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.api.prompt import SAMPLE_CHARS, Prompt, read_prompt


def words(text: str) -> int:
    return len(text.split())


def read_chat(content: Any, **fields: Any) -> Prompt:
    return read_prompt({"messages": [{"role": "user", "content": content}], **fields}, True, words)


def read_text(prompt: Any, **fields: Any) -> Prompt:
    return read_prompt({"prompt": prompt, **fields}, False, words)


@pytest.mark.parametrize(
    ("content", "text", "tokens"),
    [
        ("one two", "one two", 2),
        (None, "", 0),
        ([{"type": "text", "text": "one two"}, {"type": "image_url"}, "odd", {"text": 3}], "one two", 2),
    ],
)
def test_a_chats_text_is_read_from_strings_and_parts_with_four_tokens_for_the_template(
    content: Any, text: str, tokens: int
) -> None:
    prompt = read_chat(content)
    assert (prompt.text, prompt.tokens, prompt.max_tokens) == (text, tokens + 4, None)


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
def test_every_form_of_a_text_prompt_is_counted(prompt: Any, tokens: int, sequences: int) -> None:
    read = read_text(prompt, n=2)
    assert (read.tokens, read.sequences, read.max_tokens) == (tokens, 2 * sequences, 16)


def test_the_newer_limit_wins_over_the_older_one() -> None:
    assert read_chat("hi", max_completion_tokens=7, max_tokens=9).max_tokens == 7
    assert read_chat("hi", max_tokens=9).max_tokens == 9


def test_a_long_prompt_is_counted_by_a_sample_of_it() -> None:
    seen: list[int] = []

    def count(text: str) -> int:
        seen.append(len(text))
        return len(text) // 4

    assert read_prompt({"prompt": "x" * 10 * SAMPLE_CHARS}, False, count).tokens == 10 * SAMPLE_CHARS // 4
    assert seen == [SAMPLE_CHARS]


def test_without_a_tokenizer_four_characters_make_a_token() -> None:
    assert read_prompt({"prompt": "x" * 100}, False, lambda text: None).tokens == 25
