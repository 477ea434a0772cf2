"""The simulated engine's OpenAI Responses API: one message of text, with vLLM's order of events. Nothing is stored."""

from __future__ import annotations

import time
import uuid
from typing import TYPE_CHECKING, Any

import orjson

from engine_adapter.simulated.request import BadRequest, Completion

if TYPE_CHECKING:
    from engine_adapter.simulated.app import Choice

Json = dict[str, Any]

_KEPT = ("model", "stream", "ignore_eos", "vllm_xargs", "tools", "cache_salt")


def read_responses(body: Json) -> Completion:
    """Read a Responses body. Raises `BadRequest` naming the field."""
    if body.get("background"):
        raise BadRequest("background is not supported")
    given = body.get("input")
    if isinstance(given, str):
        given = [{"role": "user", "content": given}]
    if not isinstance(given, list):
        raise BadRequest("input must be a string or a list of items")
    instructions = [{"role": "system", "content": body["instructions"]}] if body.get("instructions") else []
    chat = {"messages": [*instructions, *given], "max_tokens": body.get("max_output_tokens")}
    return Completion.of({**chat, **{name: body[name] for name in _KEPT if name in body}}, True)


class ResponsesResponse:
    """One response, as one body or as events."""

    def __init__(self, request: Completion, choices: list[Choice], model: str) -> None:
        self.id = "resp_" + uuid.uuid4().hex
        self.request = request
        self.choices = choices
        (self._choice,) = choices
        self._item = "msg_" + uuid.uuid4().hex
        self._created = int(time.time())
        self._model = model
        self._sequence_number = 0

    def opening(self) -> bytes:
        """Events before the engine takes the request."""
        return self._events(*({"type": f"response.{kind}", "response": self._document()} for kind in _OPENING))

    def first_token(self) -> bytes:
        """Events that precede the first token."""
        item = {"id": self._item, "type": "message", "role": "assistant", "status": "in_progress", "content": []}
        return self._events(
            {"type": "response.output_item.added", "output_index": 0, "item": item},
            {"type": "response.content_part.added", **self._place, "part": _part("")},
        )

    def token(self, choice: Choice, token: int) -> bytes:
        """The event of one token."""
        delta = {"delta": choice.text(token), "logprobs": []}
        return self._events({"type": "response.output_text.delta", **self._place, **delta})

    def closing(self) -> bytes:
        """Events after the last token."""
        text, item = self._text(), self._output()[0]
        return self._events(
            {"type": "response.output_text.done", **self._place, "text": text, "logprobs": []},
            {"type": "response.content_part.done", **self._place, "part": _part(text)},
            {"type": "response.output_item.done", "output_index": 0, "item": item},
            # NOTE: vLLM names the last event so for an incomplete response too.
            {"type": "response.completed", "response": self.body()},
        )

    def body(self) -> Json:
        """The whole response."""
        choice = self._choice
        incomplete = choice.finish_reason(choice.output_tokens) == "length"
        prompt, output = choice.prompt_tokens, choice.output_tokens
        usage = {
            "input_tokens": prompt,
            "input_tokens_details": {"cached_tokens": sum(self.request.cached_tokens.values())},
            "output_tokens": output,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": prompt + output,
        }
        details = {"reason": "max_output_tokens"} if incomplete else None
        status = "incomplete" if incomplete else "completed"
        return self._document() | {
            "status": status, "incomplete_details": details, "output": self._output(), "usage": usage,
        }  # fmt: skip

    @property
    def _place(self) -> Json:
        return {"item_id": self._item, "output_index": 0, "content_index": 0}

    def _document(self) -> Json:
        return {
            "id": self.id,
            "object": "response",
            "created_at": self._created,
            "model": self._model,
            "status": "in_progress",
            "output": [],
            "usage": None,
            "background": False,
            "incomplete_details": None,
            "instructions": None,
            "max_output_tokens": self.request.max_tokens,
            "parallel_tool_calls": True,
            "tool_choice": "auto",
            "tools": [],
        }

    def _output(self) -> list[Json]:
        content = [_part(self._text())]
        return [{"id": self._item, "type": "message", "role": "assistant", "status": "completed", "content": content}]

    def _text(self) -> str:
        return "".join(self._choice.text(token) for token in range(1, self._choice.output_tokens + 1))

    def _events(self, *documents: Json) -> bytes:
        parts: list[bytes] = []
        for document in documents:
            data = orjson.dumps(document | {"sequence_number": self._sequence_number})
            parts.append(b"event: %b\ndata: %b\n\n" % (document["type"].encode(), data))
            self._sequence_number += 1
        return b"".join(parts)


_OPENING = ("created", "in_progress")


def _part(text: str) -> Json:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
