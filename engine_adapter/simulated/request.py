"""Parses OpenAI completion requests for the simulated engine."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import orjson

from engine_adapter.engine import GATE_XARG, KIND_XARG, TPOT_XARG
from engine_adapter.service_kind import KINDS_BY_LABEL, ServiceKind, default_kind
from engine_adapter.simulated.prompt import SimulatedPrompt, chat_prompt, text_tokens

MAX_SALT_CHARS = 1024
"""Longest ``cache_salt``, as in vLLM."""


class BadRequest(Exception):  # noqa: N818 - named after the HTTP status
    """The request is invalid. The client gets a 400 with the message, and with ``param`` if vLLM names one."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


@dataclass(slots=True, frozen=True)
class Completion:
    """The parts of a completion request that the simulated engine supports. Lengths are in tokens.

    Attributes:
        model: the name that the client asked for; "" if it named none.
        cache_salt: requests with different salts share no blocks of the prefix cache.
        gate: the step gate that the request names; "" for the engine's default.
        cached_tokens: prefix-cache hit of each prompt by its number, once the engine has scheduled it.
        fixed_output: output length, if ``vllm_xargs.simulated_output_tokens`` sets it.
    """

    chat: bool
    model: str
    cache_salt: str
    prompts: list[SimulatedPrompt]
    n: int
    stream: bool
    include_usage: bool
    max_tokens: int | None
    ignore_eos: bool
    pace_s: float | None
    kind: ServiceKind
    gate: str
    fixed_output: int | None
    cached_tokens: dict[int, int] = field(default_factory=dict)

    @classmethod
    def of(cls, body: dict[str, Any], chat: bool, prompts: list[SimulatedPrompt] | None = None) -> Completion:
        """Read a parsed OpenAI request body. Raises `BadRequest` naming the field.

        ``prompts``: those of the body, if they were read before.
        """
        xargs = body.get("vllm_xargs") or {}
        if not isinstance(xargs, dict):
            raise BadRequest("vllm_xargs must be an object")
        limit = _whole(body, "max_completion_tokens")
        tpot_ms = _number(xargs, TPOT_XARG)
        pace_s = None if tpot_ms is None else tpot_ms / 1000
        stream = bool(body.get("stream"))
        options = body.get("stream_options") or {}
        if not isinstance(options, dict):
            raise BadRequest("stream_options must be an object", "stream_options")
        if options and not stream:
            raise BadRequest("stream_options can only be set when stream is true")
        return cls(
            chat=chat,
            model=str(body.get("model") or ""),
            cache_salt=_cache_salt(body),
            prompts=prompts or ([_chat_prompt(body)] if chat else _text_prompts(body)),
            n=_whole(body, "n") or 1,
            stream=stream,
            include_usage=bool(options.get("include_usage")),
            max_tokens=limit if limit is not None else _whole(body, "max_tokens"),
            ignore_eos=bool(body.get("ignore_eos")),
            pace_s=pace_s,
            kind=KINDS_BY_LABEL.get(str(xargs.get(KIND_XARG)), default_kind(pace_s)),
            gate=str(xargs.get(GATE_XARG, "")),
            fixed_output=_whole(xargs, "simulated_output_tokens"),
        )


def read_object(raw: bytes) -> dict[str, Any]:
    """Parse a JSON object. Raises `BadRequest`."""
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise BadRequest(f"the body is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise BadRequest("the body must be a JSON object")
    return body


def _chat_prompt(body: dict[str, Any]) -> SimulatedPrompt:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise BadRequest("messages must be a list with at least one message")
    try:
        return chat_prompt(body, messages)
    except orjson.JSONEncodeError:
        # The parser accepts more levels than the encoder.
        raise BadRequest("the body nests too deeply") from None


def _text_prompts(body: dict[str, Any]) -> list[SimulatedPrompt]:
    prompt = body.get("prompt")
    if isinstance(prompt, str):
        return [SimulatedPrompt(prompt, text_tokens(prompt))]
    if isinstance(prompt, list) and prompt:
        if all(isinstance(part, str) for part in prompt):
            return [SimulatedPrompt(part, text_tokens(part)) for part in prompt]
        if all(isinstance(part, int) for part in prompt):
            return [SimulatedPrompt(str(prompt), prompt)]
        if all(isinstance(part, list) and all(isinstance(token, int) for token in part) for part in prompt):
            return [SimulatedPrompt(str(part), part) for part in prompt]
    raise BadRequest("prompt must be a string, a list of strings, or lists of token ids")


def _cache_salt(body: dict[str, Any]) -> str:
    salt = body.get("cache_salt")
    if salt is None:
        return ""
    if not isinstance(salt, str) or not 0 < len(salt) <= MAX_SALT_CHARS:
        raise BadRequest(f"cache_salt must be a string of 1 to {MAX_SALT_CHARS} characters")
    return salt


def _number(fields: dict[str, Any], name: str) -> float | None:
    value = fields.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise BadRequest(f"{name} must be a positive number")
    return float(value)


def _whole(fields: dict[str, Any], name: str) -> int | None:
    value = _number(fields, name)
    if value is None:
        return None
    if value != int(value):
        raise BadRequest(f"{name} must be a whole number")
    return int(value)
