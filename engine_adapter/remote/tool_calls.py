"""Assembles the tool calls of one message from the deltas of a stream, as tolerantly as clients do."""

from __future__ import annotations

from typing import Any

import orjson

Json = dict[str, Any]

_MAX_CALLS = 1024
"""Most tool calls of one message. Bounds the memory for calls that a server invents; convention."""


class UnreadableStream(Exception):  # noqa: N818 - it names an event
    """The server's stream cannot be assembled. The message says why, without quoting generated text."""


class ToolCalls:
    """The tool calls of one message.

    OpenAI sends the id and the name once, and the same ``index`` with every part of the arguments. Servers deviate, so
    a delta belongs to:

    1. the call with its id;
    2. a new call if the delta has an unknown id and a name, whatever its index;
    3. the last call with its index, or the last call at all if it has none;
    4. a new call if there is no such call, or if that call is complete and the delta has a name and arguments.

    An index only names a call and orders the calls: its value allocates nothing.
    """

    def __init__(self) -> None:
        self._calls: list[tuple[int, Json]] = []

    def add(self, deltas: Any) -> None:
        """Merge the ``tool_calls`` of one delta. Raises `UnreadableStream` or TypeError for other JSON types."""
        for delta in [deltas] if isinstance(deltas, dict) else deltas:
            if not isinstance(delta, dict):
                raise UnreadableStream("a tool call is not an object")
            self._merge(self._call_for(delta), delta)

    def assembled(self) -> list[Json]:
        """The calls, ordered by index. Calls with the same index keep the order of their first deltas."""
        return [call for _, call in sorted(self._calls, key=lambda indexed: indexed[0])]

    def _call_for(self, delta: Json) -> Json:
        index, identity = _index(delta.get("index")), delta.get("id")
        given = delta.get("function")
        function = given if isinstance(given, dict) else {}
        named = bool(function.get("name"))
        known = next((call for _, call in self._calls if call.get("id") == identity), None) if identity else None
        if known is not None:
            return known
        last = next((call for at, call in reversed(self._calls) if index is None or at == index), None)
        if last is None or (named and bool(identity) and _has_id(last)):
            return self._new(index)
        # A server may repeat the name with every part, also with an empty last one.
        if named and function.get("arguments") and _is_complete(last):
            return self._new(index)
        return last

    def _new(self, index: int | None) -> Json:
        if len(self._calls) >= _MAX_CALLS:
            raise UnreadableStream(f"a message has more than {_MAX_CALLS} tool calls")
        call: Json = {}
        highest = max((at for at, _ in self._calls), default=-1)
        self._calls.append((highest + 1 if index is None else index, call))
        return call

    def _merge(self, call: Json, delta: Json) -> None:
        for key, value in delta.items():
            if key == "function":
                call["function"] = merged_function(call.get("function") or {}, value or {})
            elif key == "id":
                # An id is never split. Some servers repeat it, or send another one, with every part.
                if value and not _has_id(call):
                    call["id"] = value
            elif key != "index" and value is not None:
                call[key] = value


def merged_function(function: Json, delta: Json) -> Json:
    """``function`` with the name and the arguments of one delta. Raises `UnreadableStream`."""
    if not isinstance(delta, dict):
        raise UnreadableStream("the function of a tool call is not an object")
    if delta.get("name"):
        function["name"] = delta["name"]
    given, old = delta.get("arguments"), function.get("arguments", "")
    if isinstance(given, dict | list):
        # A whole object instead of a part of its text.
        given = orjson.dumps(given).decode()
    elif given is not None and not isinstance(given, str):
        raise UnreadableStream("the arguments of a tool call are neither text nor an object")
    # An empty object may stand for "none yet".
    function["arguments"] = (given or old) if old == "{}" else old + (given or "")
    return function


def _index(value: Any) -> int | None:
    """The index of a delta; None if it has none that names a call. Raises `UnreadableStream`."""
    if isinstance(value, str) and value.strip().lstrip("-").isdecimal():
        value = int(value[:32])
    elif isinstance(value, float) and value.is_integer():
        value = int(value)
    if value is None or value == "":
        return None
    if isinstance(value, int) and not isinstance(value, bool):
        return value if value >= 0 else None
    raise UnreadableStream("the index of a tool call is not a number")


def _has_id(call: Json) -> bool:
    return bool(call.get("id"))


def _is_complete(call: Json) -> bool:
    """Whether the call has a name, and arguments that are a whole JSON object."""
    function = call.get("function") or {}
    arguments = function.get("arguments", "")
    if not function.get("name") or not arguments.endswith("}"):
        return False
    try:
        orjson.loads(arguments)
    except orjson.JSONDecodeError:
        return False
    return True
