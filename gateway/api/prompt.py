"""Read from a request's body what scheduling needs: prompt text and length, number of sequences, output length limits.

Only the shape of these fields is checked here. The engine checks everything else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from gateway.api.errors import bad_request

CountTokens = Callable[[str], int | None]
"""A tokenizer: the number of tokens in a text, or None if it is not available."""

SAMPLE_CHARS = 4096
"""Characters of a prompt that are tokenised. A longer prompt's count is scaled up: scheduling needs only its length."""

MAX_SEQUENCES = 256
"""Limit on the sequences of one request: ``n`` times its number of prompts. As many as an engine runs by default."""

DEFAULT_COMPLETION_TOKENS = 16
"""The OpenAI API's own default of ``max_tokens`` for text completions."""

_TEMPLATE_TOKENS = 4
"""Tokens that a chat template adds to each message, approximately."""

_CHARS_PER_TOKEN = 4.0


@dataclass(frozen=True, slots=True)
class Prompt:
    """The scheduling-relevant part of a body. Lengths in tokens, per sequence.

    ``text`` is what the length predictor sees: a text prompt, or the last user message of a chat. ``sample`` is the
    start of the text to be tokenised, which has ``chars`` characters. ``known_tokens`` need no tokenizer: prompts given
    as token ids, and the chat template.
    """

    text: str
    sample: str
    chars: int
    known_tokens: int
    sequences: int
    max_tokens: int | None
    min_tokens: int

    def tokens(self, count_tokens: CountTokens) -> int:
        """Return the prompt length in tokens, at least 1, with ``count_tokens`` applied to `sample`."""
        if not self.sample:
            return max(1, self.known_tokens)
        counted = count_tokens(self.sample)
        if counted is None:
            return max(1, self.known_tokens + round(self.chars / _CHARS_PER_TOKEN))
        return max(1, self.known_tokens + round(counted * self.chars / len(self.sample)))

    @property
    def estimated_tokens(self) -> int:
        """The prompt length in tokens at four characters a token, while no engine and so no tokenizer is chosen."""
        return self.tokens(lambda text: None)


def read_prompt(body: dict[str, Any], chat: bool) -> Prompt:
    """Read the body of a chat (``messages``) or text (``prompt``) completion. Raises `ApiError` 400."""
    if not isinstance(body.get("model", ""), str):
        raise bad_request("model: must be a string.", "model", "invalid_type")
    if not isinstance(body.get("stream") or False, bool):
        raise bad_request("stream: must be true or false.", "stream", "invalid_type")
    # An engine that knows `best_of` generates that many and returns `n`. A beam search has `n` beams.
    n = max(_whole_number(body, "n", 1) or 1, _whole_number(body, "best_of", 1) or 1)
    given = _read_chat(body) if chat else _read_completion(body)
    sequences = n * given.prompts
    if sequences > MAX_SEQUENCES:
        raise bad_request(f"n: at most {MAX_SEQUENCES} sequences per request; this one has {sequences}.", "n")
    return Prompt(
        text=given.text,
        sample=given.to_tokenise[:SAMPLE_CHARS],
        chars=len(given.to_tokenise),
        known_tokens=given.known_tokens,
        sequences=sequences,
        max_tokens=_read_max_tokens(body, chat),
        min_tokens=_whole_number(body, "min_tokens", 0) or 0,
    )


class _Given(NamedTuple):
    """A body's prompts: the predictor's text, the text to tokenise, tokens that need no tokenizer, their number."""

    text: str
    to_tokenise: str
    known_tokens: int
    prompts: int = 1


def _read_max_tokens(body: dict[str, Any], chat: bool) -> int | None:
    newer = _whole_number(body, "max_completion_tokens", 0) if chat else None
    limit = _whole_number(body, "max_tokens", 0) if newer is None else newer
    return DEFAULT_COMPLETION_TOKENS if limit is None and not chat else limit


def _read_chat(body: dict[str, Any]) -> _Given:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise bad_request("messages: must be a non-empty list of messages.", "messages", "invalid_type")
    contents: list[str] = []
    last_user_content = ""
    for index, message in enumerate(messages):
        if not isinstance(message, dict):
            raise bad_request(f"messages[{index}]: must be an object.", f"messages[{index}]", "invalid_type")
        content = _message_text(message.get("content"), index)
        if content is not None:
            contents.append(content)
            if message.get("role") == "user":
                last_user_content = content
    return _Given(last_user_content, "\n".join(contents), _TEMPLATE_TOKENS * len(messages))


def _message_text(content: Any, index: int) -> str | None:
    """Return the text of a message's ``content``: a string, or a list of parts of which some hold text."""
    if content is None or isinstance(content, str):
        return content
    if isinstance(content, list):
        return "\n".join(p["text"] for p in content if isinstance(p, dict) and isinstance(p.get("text"), str))
    where = f"messages[{index}].content"
    raise bad_request(f"{where}: must be a string or a list of parts.", where, "invalid_type")


def _read_completion(body: dict[str, Any]) -> _Given:
    """Of several prompts, the longest one is measured."""
    prompt = body.get("prompt")
    if isinstance(prompt, str):
        return _Given(prompt, prompt, 0)
    if isinstance(prompt, list) and prompt:
        if all(isinstance(p, int) for p in prompt):
            return _Given("", "", len(prompt))
        if all(isinstance(p, str) for p in prompt):
            return _Given(prompt[0], max(prompt, key=len), 0, len(prompt))
        if all(isinstance(p, list) and all(isinstance(t, int) for t in p) for p in prompt):
            return _Given("", "", max(len(p) for p in prompt), len(prompt))
    raise bad_request(
        "prompt: must be a string, a list of strings, a list of token ids, or a list of such lists.",
        "prompt",
        "invalid_type",
    )


def _whole_number(body: dict[str, Any], field: str, minimum: int) -> int | None:
    value = body.get(field)
    if value is None:
        return None
    # NOTE: bool is a subclass of int, but JSON's true is not a number.
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise bad_request(f"{field}: must be a whole number, at least {minimum}.", field)
    return value
