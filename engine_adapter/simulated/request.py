"""Parses OpenAI completion requests for the simulated engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import orjson

from engine_adapter.engine import GATE_XARG, KIND_XARG, TPOT_XARG
from engine_adapter.service_kind import KINDS_BY_LABEL, ServiceKind, default_kind


class BadRequest(Exception):  # noqa: N818 - named after the HTTP status
    """The request is invalid. The client gets a 400 with the message."""


@dataclass(slots=True, frozen=True)
class Completion:
    """The parts of a completion request that the simulated engine supports. Lengths are in tokens.

    Attributes:
        model: the model that the request names; "" if none.
        prompts: text and length of each prompt.
        gate: the step gate that the request names; "" for the engine's default.
        fixed_output: output length, if ``vllm_xargs.simulated_output_tokens`` sets it.
    """

    chat: bool
    model: str
    prompts: list[tuple[str, int]]
    n: int
    stream: bool
    include_usage: bool
    max_tokens: int | None
    ignore_eos: bool
    pace_s: float | None
    kind: ServiceKind
    gate: str
    fixed_output: int | None

    @classmethod
    def parse(cls, raw: bytes, chat: bool) -> Completion:
        """Parse an OpenAI request body. Raises `BadRequest` naming the field."""
        return cls.of(read_object(raw), chat)

    @classmethod
    def of(cls, body: dict[str, Any], chat: bool) -> Completion:
        """Read a parsed OpenAI request body. Raises `BadRequest` naming the field."""
        xargs = body.get("vllm_xargs") or {}
        if not isinstance(xargs, dict):
            raise BadRequest("vllm_xargs must be an object")
        limit = _whole(body, "max_completion_tokens")
        tpot_ms = _number(xargs, TPOT_XARG)
        pace_s = None if tpot_ms is None else tpot_ms / 1000
        stream = bool(body.get("stream"))
        if body.get("stream_options") and not stream:
            raise BadRequest("stream_options can only be set when stream is true")
        return cls(
            chat=chat,
            model=str(body.get("model") or ""),
            prompts=[_chat_prompt(body)] if chat else _text_prompts(body),
            n=_whole(body, "n") or 1,
            stream=stream,
            include_usage=bool((body.get("stream_options") or {}).get("include_usage")),
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


def _chat_prompt(body: dict[str, Any]) -> tuple[str, int]:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise BadRequest("messages must be a list with at least one message")
    texts: list[str] = []
    for message in messages:
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, str):
            texts.append(content)
        elif isinstance(content, list):
            texts += [str(part.get("text", "")) for part in content if isinstance(part, dict)]
    return _text_prompt("\n".join(texts))


def _text_prompts(body: dict[str, Any]) -> list[tuple[str, int]]:
    prompt = body.get("prompt")
    if isinstance(prompt, str):
        return [_text_prompt(prompt)]
    if isinstance(prompt, list) and prompt:
        if all(isinstance(part, str) for part in prompt):
            return [_text_prompt(part) for part in prompt]
        if all(isinstance(part, int) for part in prompt):
            return [(str(prompt), len(prompt))]
        if all(isinstance(part, list) for part in prompt):
            return [(str(part), max(1, len(part))) for part in prompt]
    raise BadRequest("prompt must be a string, a list of strings, or lists of token ids")


def _text_prompt(text: str) -> tuple[str, int]:
    return text, max(1, len(text.split()))


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
