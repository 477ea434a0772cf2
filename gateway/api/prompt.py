"""What scheduling must know of a request's body: its prompt's text and length, how many answers, how long at most.

Only shape is checked here; whether the engine likes the contents, the engine says itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gateway.api.errors import bad_request

SAMPLE_CHARS = 4096
"""A longer prompt is tokenised only this far and scaled up: scheduling needs the length, not the tokens."""

MAX_SEQUENCES = 256
"""The most answers one body may ask for: ``n`` times its prompts."""

_TEMPLATE_TOKENS = 4
"""What a chat template adds to each message, about."""

_CHARS_PER_TOKEN = 4.0


@dataclass(frozen=True, slots=True)
class Prompt:
    """Read from the body: how many tokens (about) and ``sequences``; ``text`` is what the predictor is shown.

    Of a chat that is the last message of the user: it is what the answer answers, and what the predictor knows.
    """

    text: str
    tokens: int
    sequences: int
    max_tokens: int | None
    min_tokens: int


def read_prompt(body: dict[str, Any], chat: bool, count_tokens: Callable[[str], int | None]) -> Prompt:
    """Read a chat (``messages``) or text (``prompt``) completion's body; raises `ApiError` 400 naming the field."""
    if not isinstance(body.get("model", ""), str):
        raise bad_request("model: must be a string.", "model", "invalid_type")
    if not isinstance(body.get("stream") or False, bool):
        raise bad_request("stream: must be true or false.", "stream", "invalid_type")
    n = _whole_number(body, "n", 1) or 1
    limit = _whole_number(body, "max_completion_tokens", 0) if chat else None
    if limit is None:
        limit = _whole_number(body, "max_tokens", 0)
    least = _whole_number(body, "min_tokens", 0) or 0
    if chat:
        text, tokens, prompts = *_chat_text(body, count_tokens), 1
    else:
        text, tokens, prompts = _completion_text(body, count_tokens)
        if limit is None:
            limit = 16  # the API's own default for text completions
    if n * prompts > MAX_SEQUENCES:
        raise bad_request(f"n: at most {MAX_SEQUENCES} answers for one request, but this asks for {n * prompts}.", "n")
    return Prompt(text, max(1, tokens), n * prompts, limit, least)


def _chat_text(body: dict[str, Any], count: Callable[[str], int | None]) -> tuple[str, int]:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise bad_request("messages: must be a non-empty list of messages.", "messages", "invalid_type")
    parts: list[str] = []
    question = ""
    for index, message in enumerate(messages):
        if not isinstance(message, dict):
            raise bad_request(f"messages[{index}]: must be an object.", f"messages[{index}]", "invalid_type")
        content = message.get("content")
        if isinstance(content, list):
            content = "\n".join(p["text"] for p in content if isinstance(p, dict) and isinstance(p.get("text"), str))
        if isinstance(content, str):
            parts.append(content)
            if message.get("role") == "user":
                question = content
        elif content is not None:
            where = f"messages[{index}].content"
            raise bad_request(f"{where}: must be a string or a list of parts.", where, "invalid_type")
    return question, _length("\n".join(parts), count) + _TEMPLATE_TOKENS * len(messages)


def _completion_text(body: dict[str, Any], count: Callable[[str], int | None]) -> tuple[str, int, int]:
    """The text, the tokens of the longest prompt, and how many prompts there are."""
    prompt = body.get("prompt")
    if isinstance(prompt, str):
        return prompt, _length(prompt, count), 1
    if isinstance(prompt, list) and prompt:
        if all(isinstance(p, int) for p in prompt):
            return "", len(prompt), 1
        if all(isinstance(p, str) for p in prompt):
            return prompt[0], _length(max(prompt, key=len), count), len(prompt)
        if all(isinstance(p, list) and all(isinstance(t, int) for t in p) for p in prompt):
            return "", max(len(p) for p in prompt), len(prompt)
    raise bad_request(
        "prompt: must be a string, a list of strings, a list of token ids, or a list of such lists.",
        "prompt",
        "invalid_type",
    )


def _length(text: str, count: Callable[[str], int | None]) -> int:
    sample = text[:SAMPLE_CHARS]
    if not sample:
        return 0
    tokens = count(sample)
    if tokens is None:
        return round(len(text) / _CHARS_PER_TOKEN)
    return round(tokens * len(text) / len(sample))


def _whole_number(body: dict[str, Any], field: str, least: int) -> int | None:
    value = body.get(field)
    if value is None:
        return None
    # bool is an int to Python, but not to whoever wrote `"n": true`.
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise bad_request(f"{field}: must be a whole number of at least {least}.", field)
    return value
