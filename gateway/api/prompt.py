"""Read from a request's body what scheduling needs: the prompt, the number of sequences, output length limits.

Only the shape of these fields is checked here. The engine checks everything else.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from gateway.api.errors import bad_request
from gateway.prompts.content import Features, Part, PromptContent
from gateway.prompts.reader import last_text, read_message, read_parts, read_tools

_ELSEWHERE = frozenset(
    (
        "truncate_prompt_tokens",
        "previous_response_id",
        "conversation",
        "prompt_embeds",
        "input_embeds",
        "chat_template",
        "context_management",
    )
)
"""Fields that cut the prompt, replace its template, or name a part of it that the server has."""

MAX_SEQUENCES = 256
"""Limit on the sequences of one request: ``n`` times its number of prompts. As many as an engine runs by default."""

DEFAULT_COMPLETION_TOKENS = 16
"""The OpenAI API's own default of ``max_tokens`` for text completions."""


@dataclass(slots=True)
class Prompt:
    """The scheduling-relevant part of a body. Lengths in tokens, per sequence.

    ``text`` is what the length predictor sees: a text prompt, or the last user message. ``content`` is the whole
    prompt; of several, the longest. ``whole``: the engine counts the tokens of ``content`` and of nothing else.
    ``prompts``: how many there are.
    """

    text: str
    content: PromptContent
    sequences: int = 1
    max_tokens: int | None = None
    min_tokens: int = 0
    whole: bool = True
    prompts: int = 1
    _features: Features | None = None

    @property
    def features(self) -> Features:
        """The features that the prompt's size is estimated from."""
        if self._features is None:
            self._features = self.content.features()
        return self._features


def read_chat(body: dict[str, Any]) -> Prompt:
    """Read the body of `/v1/chat/completions`. Raises `ApiError` 400."""
    n = _read_common(body)
    content = PromptContent()
    read_tools(body.get("tools") or body.get("functions"), content)
    text = _read_messages(body, content)
    read_parts(body.get("documents"), content)
    _read_schema(body, content)
    newer = _whole_number(body, "max_completion_tokens", 0)
    limit = _whole_number(body, "max_tokens", 0) if newer is None else newer
    return Prompt(text, content, n, limit, _whole_number(body, "min_tokens", 0) or 0, _is_whole(body))


def read_completion(body: dict[str, Any]) -> Prompt:
    """Read the body of `/v1/completions`. Raises `ApiError` 400."""
    n = _read_common(body)
    content = PromptContent()
    text, prompts = _read_text_prompts(body.get("prompt"), content)
    limit = _whole_number(body, "max_tokens", 0)
    return Prompt(
        text,
        content,
        _checked_sequences(n * prompts),
        DEFAULT_COMPLETION_TOKENS if limit is None else limit,
        _whole_number(body, "min_tokens", 0) or 0,
        prompts == 1 and _is_whole(body),
        prompts,
    )


def read_batch(body: dict[str, Any]) -> Prompt:
    """Read a batch of chats, each of which is one sequence. Of several prompts, the longest counts."""
    chats = body.get("messages")
    if not isinstance(chats, list) or not chats:
        raise bad_request("messages: must be a non-empty list of conversations.", "messages", "invalid_type")
    if len(chats) > MAX_SEQUENCES:
        raise bad_request(f"messages: at most {MAX_SEQUENCES} conversations; this one has {len(chats)}.", "messages")
    if body.get("n") not in (None, 1):
        raise bad_request("n: a batch generates one choice for each conversation. Remove `n`.", "n")
    longest = max(chats, key=_size_of_messages)
    return replace(
        read_chat({**body, "messages": longest}), sequences=len(chats), whole=len(chats) == 1, prompts=len(chats)
    )


def read_messages(body: dict[str, Any]) -> Prompt:
    """Read the body of Anthropic's `/v1/messages`. Raises `ApiError` 400."""
    _read_common(body)
    content = PromptContent()
    read_tools(body.get("tools"), content)
    _read_instructions(body, "system", content)
    text = _read_messages(body, content)
    config = body.get("output_config")
    content.add_json(config.get("format") if isinstance(config, dict) else None, Part.SCHEMA)
    return Prompt(text, content, max_tokens=_whole_number(body, "max_tokens", 1), whole=_is_whole(body))


def read_responses(body: dict[str, Any]) -> Prompt:
    """Read the body of `/v1/responses`. Raises `ApiError` 400.

    A background response outlives its HTTP request, so its end could not be observed.
    """
    _read_common(body)
    if body.get("background") not in (None, False):
        raise bad_request(
            "background: not supported, because the response would outlive its request. Send the request without it, "
            "and read the response as a stream.",
            "background",
            "unsupported_parameter",
        )
    content = PromptContent()
    read_tools(body.get("tools"), content)
    _read_instructions(body, "instructions", content)
    text = _read_input(body.get("input"), content)
    form = body.get("text")
    content.add_json(form.get("format") if isinstance(form, dict) else None, Part.SCHEMA)
    return Prompt(text, content, max_tokens=_whole_number(body, "max_output_tokens", 1), whole=_is_whole(body))


def _is_whole(body: dict[str, Any]) -> bool:
    """Whether a body holds its whole prompt, so that the engine's count of tokens belongs to it."""
    if not _ELSEWHERE.isdisjoint(body) and any(body.get(field) is not None for field in _ELSEWHERE):
        return False
    return not isinstance(body.get("prompt"), dict)


def _read_common(body: dict[str, Any]) -> int:
    """Check the fields that all bodies have, and return the number of sequences for each prompt."""
    if not isinstance(body.get("model") or "", str):
        raise bad_request("model: must be a string.", "model", "invalid_type")
    if not isinstance(body.get("stream") or False, bool):
        raise bad_request("stream: must be true or false.", "stream", "invalid_type")
    # An engine that knows `best_of` generates that many and returns `n`. A beam search has `n` beams.
    n, best_of = _whole_number(body, "n", 1) or 1, _whole_number(body, "best_of", 1) or 1
    return _checked_sequences(max(n, best_of), "best_of" if best_of > n else "n")


def _checked_sequences(sequences: int, field: str = "n") -> int:
    if sequences > MAX_SEQUENCES:
        raise bad_request(f"{field}: at most {MAX_SEQUENCES} sequences per request; this one has {sequences}.", field)
    return sequences


def _read_instructions(body: dict[str, Any], field: str, content: PromptContent) -> None:
    """Add the system message in ``field``, if there is one: text, or a list of parts."""
    given = body.get(field)
    if given is None:
        return
    if not isinstance(given, str | list):
        raise bad_request(f"{field}: must be a string or a list of parts.", field, "invalid_type")
    content.add_message("system")
    read_parts(given, content)


def _read_messages(body: dict[str, Any], content: PromptContent) -> str:
    """Add the messages to ``content``, and return the text of the user's last one."""
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise bad_request("messages: must be a non-empty list of messages.", "messages", "invalid_type")
    last = ""
    for index, message in enumerate(messages):
        if not isinstance(message, dict):
            raise bad_request(f"messages[{index}]: must be an object.", f"messages[{index}]", "invalid_type")
        given = _checked_content(message, f"messages[{index}].content")
        read_message(message, content)
        if message.get("role") == "user":
            last = last_text(given) or last
    return last


def _size_of_messages(messages: Any) -> int:
    """Return the size of a chat in bytes, to compare chats by. The rest of a batch's body is the same for all."""
    content = PromptContent()
    _read_messages({"messages": messages}, content)
    return content.size_bytes


def _checked_content(message: dict[str, Any], where: str) -> Any:
    """Return the message's content: None, a string, or a list of parts."""
    given = message.get("content")
    if given is not None and not isinstance(given, str | list):
        raise bad_request(f"{where}: must be a string or a list of parts.", where, "invalid_type")
    return given


def _read_input(given: Any, content: PromptContent) -> str:
    """Add the ``input`` of the Responses API, and return the text of the user's last message."""
    if isinstance(given, str):
        content.add_message("user")
        content.add_text(given)
        return given
    if not isinstance(given, list):
        raise bad_request("input: must be a string or a list of items.", "input", "invalid_type")
    last = ""
    for index, item in enumerate(given):
        if not isinstance(item, dict):
            raise bad_request(f"input[{index}]: must be an object.", f"input[{index}]", "invalid_type")
        if "role" in item:
            text = last_text(_checked_content(item, f"input[{index}].content"))
            read_message(item, content)
            if item["role"] == "user":
                last = text or last
        else:
            content.add_message(str(item.get("type", "")))
            read_parts([item], content)
    return last


def _read_text_prompts(prompt: Any, content: PromptContent) -> tuple[str, int]:
    """Add the longest prompt to ``content``. Return the first one's text, and the number of prompts."""
    if isinstance(prompt, str):
        content.add_text(prompt)
        return prompt, 1
    if isinstance(prompt, list) and prompt:
        if _are_tokens(prompt):
            content.token_ids = prompt
            return "", 1
        if all(isinstance(p, str) for p in prompt):
            content.add_text(max(prompt, key=len))
            return prompt[0], len(prompt)
        if all(isinstance(p, list) and _are_tokens(p) for p in prompt):
            content.token_ids = max(prompt, key=len)
            return "", len(prompt)
    raise bad_request(
        "prompt: must be a string, a list of strings, a list of token ids, or a list of such lists.",
        "prompt",
        "invalid_type",
    )


def _are_tokens(ids: list[Any]) -> bool:
    return all(type(one) is int and 0 <= one < 1 << 32 for one in ids)


def _read_schema(body: dict[str, Any], content: PromptContent) -> None:
    """Add what constrains the output: some servers render it into the prompt."""
    form = body.get("response_format")
    if isinstance(form, dict) and form.get("type") not in ("text", None):
        content.add_json(form, Part.SCHEMA)
    content.add_json(body.get("guided_json") or body.get("structured_outputs"), Part.SCHEMA)


def _whole_number(body: dict[str, Any], field: str, minimum: int) -> int | None:
    value = body.get(field)
    if value is None:
        return None
    if isinstance(value, float) and value.is_integer() and abs(value) < 1 << 53:
        # JSON has one type of numbers: some clients write 16 as 16.0, and engines accept that.
        value = int(value)
    # NOTE: bool is a subclass of int, but JSON's true is not a number.
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise bad_request(f"{field}: must be a whole number, at least {minimum}.", field)
    return value
