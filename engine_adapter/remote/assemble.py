"""Assembles the events of a streamed completion into the JSON body of the same request without streaming.

The first token of a non-streaming request cannot be observed. The proxy therefore requests a stream and assembles the
body here. This module does no I/O.
"""

from __future__ import annotations

import json
from typing import Any

from engine_adapter.remote.sse import ParsedEvent
from engine_adapter.remote.text_events import Place
from engine_adapter.remote.tool_calls import ToolCalls, UnreadableStream, merged_function
from engine_adapter.remote.upstream_error import error_in, error_status

Json = dict[str, Any]

NOT_REBUILDABLE = frozenset(
    {
        # Only the non-streaming response has these, or computes them differently.
        "prompt_logprobs",
        "best_of",
        "use_beam_search",
        "return_token_ids",
        "kv_transfer_params",
        # Audio deltas (transcripts and base64 data) have their own merge rules.
        "audio",
        "modalities",
        # Invalid in a non-streaming request: the server rejects it itself.
        "stream_options",
    }
)
"""Request fields for which the response cannot be rebuilt from a stream."""

MAX_RESPONSE_BYTES = 64 << 20
"""Largest stream in bytes that is assembled. Bounds the memory for one response; convention."""

_INDEX_LIMIT = 1 << 31
_MAX_CHOICES = 4096
"""Most choices that are assembled. Bounds the memory for choices that the request did not ask for; convention."""


def can_rebuild(body: Json) -> bool:
    """Whether the non-streaming response to ``body`` (a parsed OpenAI request) can be rebuilt from a stream."""
    # NOTE: not `in (None, False)`, because 0 == False and prompt_logprobs=0 counts as set.
    if not NOT_REBUILDABLE.isdisjoint(body) and any(
        body.get(name) is not None and body[name] is not False for name in NOT_REBUILDABLE
    ):
        return False
    # Echoed prompt tokens have logprobs, whose text offsets restart in a stream.
    return not (body.get("echo") and body.get("logprobs") is not None)


_BLANK_LINES = (b"\n\n", b"\r\r", b"\n\r", b"\n\r\n")
"""How an event ends. One without it was cut off, which is a lost stream and not an unreadable one."""


class Assembler:
    """Merges the events of one stream, in order, into one response body.

    Per choice index, it concatenates text, content, reasoning, refusal and the arguments of function and tool calls
    (see `ToolCalls`). It extends logprob lists and keeps finish and stop reasons. Unknown fields are merged by type:
    strings are concatenated, lists are extended, other values are replaced.
    """

    def __init__(self) -> None:
        self._top: Json = {}
        self._choices: dict[int, Json] = {}
        self._tool_calls: dict[int, ToolCalls] = {}
        self._error: Json | None = None
        self._done = False
        self._bytes = 0
        self._texts: list[bytes] = []
        self._place: Place = (0, "")

    def add_texts(self, place: Place, texts: list[bytes], size: int) -> None:
        """Merge events of ``size`` bytes that differ from an earlier one in their ``texts`` only (`TextEvents`)."""
        self._count_bytes(size)
        if place != self._place:
            self._merge_texts()
            self._place = place
        self._texts += texts

    def add(self, event: ParsedEvent) -> None:
        """Merge one event. Comments and events without a JSON object are skipped. Raises `UnreadableStream`."""
        self._count_bytes(len(event.raw))
        if self._texts:
            self._merge_texts()
        data, chunk, error = event.data, event.chunk, event.error
        if chunk is None and data.lstrip().startswith(b"{") and event.raw.endswith(_BLANK_LINES):
            chunk = _parse_leniently(data)
            error = error_in(event.name, data, chunk)
        if error is not None:
            self._error = error
        elif chunk is None:
            self._done |= data.startswith(b"[DONE]")
        else:
            try:
                self._add_chunk(chunk)
            except (TypeError, ValueError, AttributeError) as wrong:
                # Not its text, which may quote the answer.
                raise UnreadableStream("an event has a field of the wrong type") from wrong

    @property
    def complete(self) -> bool:
        """Whether the stream has ended: ``[DONE]``, an error, or a finish reason for every choice."""
        if self._done or self._error is not None:
            return True
        return bool(self._choices) and all(c.get("finish_reason") for c in self._choices.values())

    def response(self) -> tuple[int, Json]:
        """HTTP status and body. An error event sets the status to its code, or to 500 if that is not 400 to 599.

        Raises `UnreadableStream` if there was no choice.
        """
        self._merge_texts()
        if self._error is not None:
            return error_status(self._error), {"error": self._error}
        if not self._choices:
            raise UnreadableStream("the stream has no choices")
        for index, calls in self._tool_calls.items():
            self._choices[index]["message"]["tool_calls"] = calls.assembled()
        body = dict(self._top)
        if body.get("object") == "chat.completion.chunk":
            body["object"] = "chat.completion"
        body["choices"] = [self._choices[index] for index in sorted(self._choices)]
        # OpenAI's field order: usage follows the choices.
        if "usage" in body:
            body["usage"] = body.pop("usage")
        return 200, body

    def _count_bytes(self, size: int) -> None:
        self._bytes += size
        if self._bytes > MAX_RESPONSE_BYTES:
            raise UnreadableStream(f"the response is larger than {MAX_RESPONSE_BYTES >> 20} MiB")

    def _merge_texts(self) -> None:
        """Merge the texts of `add_texts`, whose events were otherwise merged before."""
        if self._texts:
            index, key = self._place
            text = _unescaped(self._texts)
            self._texts = []
            self._add_choice(
                {"index": index, "text": text} if key == "text" else {"index": index, "delta": {key: text}}
            )

    def _add_chunk(self, chunk: Json) -> None:
        top = dict(chunk)
        choices = top.pop("choices", None)
        if None in top.values():
            top = {key: value for key, value in top.items() if value is not None}
        self._top.update(top)
        for choice in choices or ():
            self._add_choice(choice)

    def _add_choice(self, chunk: Json) -> None:
        index = int(chunk.get("index") or 0)
        if not 0 <= index < _INDEX_LIMIT:
            raise UnreadableStream("the index of a choice is negative or too large")
        choice = self._choices.get(index)
        if choice is None:
            if len(self._choices) >= _MAX_CHOICES:
                raise UnreadableStream(f"the stream has more than {_MAX_CHOICES} choices")
            choice = self._choices[index] = {"index": index, "logprobs": None, "finish_reason": None}
        for key, value in chunk.items():
            if key == "delta":
                self._add_delta(index, choice, value or {})
            elif key == "text":
                choice["text"] = choice.get("text", "") + (value or "")
            elif value is None:
                choice.setdefault(key, None)
            elif key == "logprobs":
                choice["logprobs"] = _merged(choice["logprobs"], value)
            elif key != "index":
                choice[key] = value

    def _add_delta(self, index: int, choice: Json, delta: Json) -> None:
        message = choice.get("message")
        if message is None:
            message = {"role": "assistant", "content": None, "refusal": None}
            # OpenAI's field order: the message follows the index.
            rest = {key: choice.pop(key) for key in list(choice) if key != "index"}
            choice |= {"message": message, **rest}
        for key, value in delta.items():
            if key == "tool_calls":
                if value:
                    message.setdefault("tool_calls", None)
                    self._tool_calls.setdefault(index, ToolCalls()).add(value)
            elif key == "function_call":
                if value:
                    message[key] = merged_function(message.get(key) or {}, value)
            elif key == "role":
                message["role"] = value or message["role"]
            else:
                message[key] = _merged(message.get(key), value)
        # A role chunk has empty content; a message with tool calls has null instead.
        if "tool_calls" in message and not message["content"]:
            message["content"] = None


def _unescaped(texts: list[bytes]) -> str:
    """The concatenated ``texts``, each the inside of a JSON string without escapes."""
    try:
        return b"".join(texts).decode()
    except UnicodeDecodeError:
        return "".join([text.decode(errors="replace") for text in texts])


def _parse_leniently(data: bytes) -> Json:
    """Parse an object with NaN, control characters or invalid UTF-8. Raises `UnreadableStream`.

    Skipping the event would lose a part of the answer.
    """
    try:
        parsed: Json = json.loads(data.decode(errors="replace"), strict=False)
    except (ValueError, RecursionError):
        # Without the cause, whose text may quote the answer.
        raise UnreadableStream("an event is not valid JSON") from None
    return parsed


def _merged(old: Any, new: Any) -> Any:
    if old is None or new is None:
        return new if old is None else old
    if isinstance(old, str) and isinstance(new, str):
        return old + new
    if isinstance(old, list) and isinstance(new, list):
        return old + new
    if isinstance(old, dict) and isinstance(new, dict):
        return old | {key: _merged(old.get(key), value) for key, value in new.items()}
    return new
