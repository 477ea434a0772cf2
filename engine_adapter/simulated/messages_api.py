"""The simulated engine's Anthropic Messages API: one block of text, with vLLM's order of events."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Any

import orjson

from engine_adapter.simulated.request import BadRequest, Completion

if TYPE_CHECKING:
    from engine_adapter.simulated.app import Choice

Json = dict[str, Any]

_KEPT = ("model", "max_tokens", "stream", "ignore_eos", "vllm_xargs", "tools", "cache_salt")


def read_messages(body: Json) -> Completion:
    """Read a Messages body. Raises `BadRequest` naming the field."""
    if not isinstance(body.get("max_tokens"), int) or body["max_tokens"] < 1:
        raise BadRequest("max_tokens is required and must be a positive whole number")
    return Completion.of(_chat(body), True)


def count_tokens(body: Json) -> Json:
    """Return the answer to ``count_tokens``. Raises `BadRequest` naming the field."""
    (prompt,) = Completion.of(_chat(body), True).prompts
    return {"input_tokens": prompt.size}


def _chat(body: Json) -> Json:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise BadRequest("messages must be a list with at least one message")
    system = [{"role": "system", "content": body["system"]}] if body.get("system") else []
    kept: Json = {name: body[name] for name in _KEPT if name in body}
    return {"messages": [*system, *messages], **kept}


class MessagesResponse:
    """One response, as one body or as events."""

    def __init__(self, request: Completion, choices: list[Choice], model: str) -> None:
        self.id = "msg_" + uuid.uuid4().hex
        self.request = request
        self.choices = choices
        (self._choice,) = choices
        self._model = model

    def opening(self) -> bytes:
        """Events before the engine takes the request."""
        return b""

    def first_token(self) -> bytes:
        """Events that precede the first token."""
        message = self._document() | {"content": [], "stop_reason": None, "usage": self._usage(0)}
        start = _event({"type": "message_start", "message": message})
        block = {"type": "text", "text": ""}
        return start + _event({"type": "content_block_start", "index": 0, "content_block": block})

    def token(self, choice: Choice, token: int) -> bytes:
        """The event of one token; none for a token without text."""
        text = choice.text(token)
        delta = {"type": "text_delta", "text": text}
        return _event({"type": "content_block_delta", "index": 0, "delta": delta}) if text else b""

    def closing(self) -> bytes:
        """Events after the last token."""
        usage = self._usage(self._choice.output_tokens)
        delta = {"stop_reason": self._stop_reason(), "stop_sequence": None}
        return (
            _event({"type": "content_block_stop", "index": 0})
            + _event({"type": "message_delta", "delta": delta, "usage": usage})
            + _event({"type": "message_stop"})
        )

    def body(self) -> Json:
        """The whole response."""
        choice = self._choice
        text = "".join(choice.text(token) for token in range(1, choice.output_tokens + 1))
        return self._document() | {
            "content": [{"type": "text", "text": text}],
            "stop_reason": self._stop_reason(),
            "usage": self._usage(choice.output_tokens),
        }

    def _document(self) -> Json:
        return {"id": self.id, "type": "message", "role": "assistant", "model": self._model, "stop_sequence": None}

    def _stop_reason(self) -> str:
        return "max_tokens" if self._choice.finish_reason(self._choice.output_tokens) == "length" else "end_turn"

    def _usage(self, output_tokens: int) -> Json:
        return {"input_tokens": self._choice.prompt_tokens, "output_tokens": output_tokens}


def _event(document: Json) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (document["type"].encode(), orjson.dumps(document))
