"""Assembles the events of a streamed completion into the JSON body of the same request without streaming.

The first token of a non-streaming request cannot be observed. The proxy therefore requests a stream and assembles the
body here. This module does no I/O.
"""

from __future__ import annotations

from typing import Any

from engine_adapter.remote.sse import event_data, parse_event

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

_OBJECTS = {"chat.completion.chunk": "chat.completion"}


def can_rebuild(body: Json) -> bool:
    """Whether the non-streaming response to ``body`` (a parsed OpenAI request) can be rebuilt from a stream."""
    # NOTE: not `in (None, False)`, because 0 == False and prompt_logprobs=0 counts as set.
    if any(body.get(name) is not None and body[name] is not False for name in NOT_REBUILDABLE):
        return False
    # Echoed prompt tokens have logprobs, whose text offsets restart in a stream.
    return not (body.get("echo") and body.get("logprobs") is not None)


class Assembler:
    """Merges the events of one stream, in order, into one response body.

    Per choice index, it concatenates text, content, reasoning, refusal and the arguments of function and tool calls
    (tool calls by their own index). It extends logprob lists and keeps finish and stop reasons. Unknown fields
    are merged by type: strings are concatenated, lists are extended, other values are replaced.
    """

    def __init__(self) -> None:
        self._top: Json = {}
        self._choices: dict[int, Json] = {}
        self._error: Json | None = None
        self._done = False

    def add(self, event: bytes) -> None:
        """Merge one raw event. Comments and events without valid JSON are skipped."""
        chunk = parse_event(event)
        if chunk is None:
            self._done |= event_data(event).strip() == b"[DONE]"
            return
        if chunk.get("error"):
            self._error = {"error": chunk["error"]}
            return
        for key, value in chunk.items():
            if key == "choices":
                for choice in value or ():
                    self._add_choice(choice)
            elif value is not None:
                self._top[key] = value

    @property
    def complete(self) -> bool:
        """Whether the stream has ended: ``[DONE]``, an error, or a finish reason for every choice."""
        if self._done or self._error is not None:
            return True
        return bool(self._choices) and all(c.get("finish_reason") for c in self._choices.values())

    def response(self) -> tuple[int, Json]:
        """HTTP status and body. An error event sets the status to its code, or to 500 if that is not 400 to 599."""
        if self._error is not None:
            code = self._error["error"].get("code") if isinstance(self._error["error"], dict) else None
            return (code if isinstance(code, int) and 400 <= code <= 599 else 500), self._error
        body = dict(self._top)
        body["object"] = _OBJECTS.get(body.get("object", ""), body.get("object"))
        body["choices"] = [self._choices[index] for index in sorted(self._choices)]
        # OpenAI's field order: usage follows the choices.
        if "usage" in body:
            body["usage"] = body.pop("usage")
        return 200, body

    def _add_choice(self, chunk: Json) -> None:
        index = chunk.get("index", 0)
        choice = self._choices.get(index)
        if choice is None:
            choice = self._choices[index] = {"index": index}
            if "delta" in chunk:
                choice["message"] = {"role": "assistant", "content": None, "refusal": None}
            choice |= {"logprobs": None, "finish_reason": None}
        for key, value in chunk.items():
            if key == "delta":
                _merge_message(choice["message"], value or {})
            elif key == "logprobs":
                choice["logprobs"] = _merged(choice["logprobs"], value)
            elif key == "text":
                choice["text"] = choice.get("text", "") + (value or "")
            elif key != "index" and (value is not None or key not in choice):
                choice[key] = value


def _merge_message(message: Json, delta: Json) -> None:
    for key, value in delta.items():
        if key == "tool_calls":
            if value:
                _merge_tool_calls(message.setdefault("tool_calls", []), value)
        elif key == "function_call":
            if value:
                message[key] = _merge_function(message.get(key) or {}, value)
        elif key == "role":
            message["role"] = value or message["role"]
        else:
            message[key] = _merged(message.get(key), value)
    # A role chunk has empty content; a message with tool calls has null instead.
    if message.get("tool_calls") and not message["content"]:
        message["content"] = None


def _merge_tool_calls(calls: list[Json], deltas: list[Json]) -> None:
    for delta in deltas:
        position = delta.get("index", len(calls))
        while len(calls) <= position:
            calls.append({})
        call = calls[position]
        for key, value in delta.items():
            if key == "function":
                call["function"] = _merge_function(call.get("function") or {}, value or {})
            elif key != "index" and value is not None:
                # Ids and types are never split; some servers repeat them in every delta.
                call[key] = value


def _merge_function(function: Json, delta: Json) -> Json:
    if delta.get("name"):
        function["name"] = delta["name"]
    function["arguments"] = function.get("arguments", "") + (delta.get("arguments") or "")
    return function


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
