"""Splits a byte stream into server-sent events and reads their fields, as the WHATWG specification defines them.

The raw bytes of each event are kept, so that they can pass through unchanged. This module does no I/O.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import orjson

from engine_adapter.remote.upstream_error import error_in

MAX_EVENT_BYTES = 8 << 20
"""Largest event in bytes. Bounds the memory for one event of a server that never ends it; convention."""

# Two line ends in a row. A line ends in LF, CRLF or CR.
_BLANK_LINE = re.compile(rb"\n\n|[\r\n]\r\n?")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class EventTooLarge(Exception):  # noqa: N818 - it names an event of the protocol
    """An event is larger than `MAX_EVENT_BYTES`."""


class SSESplitter:
    """Splits a byte stream into complete server-sent events, independent of network chunks.

    INVARIANT: the raw bytes of all events plus `take_rest` are the bytes fed so far.

    An event is complete at its blank line. If a chunk ends between the CR and the LF of a blank line, the event is
    returned at once, and the LF follows as an item of its own: a stream with lone CRs would be late by one event
    otherwise.
    """

    def __init__(self) -> None:
        self._pending = bytearray()
        self._after_cr = False
        self._between_events = True
        """Neither an event nor a line end is pending."""

    def feed(self, data: bytes) -> list[bytes]:
        """The events completed by ``data``, each with its closing blank line. Raises `EventTooLarge`."""
        if self._between_events and data.endswith(b"\n\n") and data.find(b"\r") < 0:
            # Fast path: the chunk is exactly one event. The first test finds those of one line at less cost.
            last = len(data) - 2
            if data.find(b"\n") == last or data.find(b"\n\n") == last:
                return [data]
            *events, rest = data.split(b"\n\n")
            if not rest:
                return [event + b"\n\n" for event in events]
        return self._split(data)

    def is_one_event(self, data: bytes) -> bool:
        """Whether ``data``, if it is fed next, is surely one event. Then it need not be fed."""
        # NOTE: a blank line that does not end ``data`` is found before one that does.
        return self._between_events and 0 < data.find(b"\n\n") == len(data) - 2 and data.find(b"\r") < 0

    def _split(self, data: bytes) -> list[bytes]:
        events: list[bytes] = []
        if self._after_cr and data:
            self._after_cr = False
            if data.startswith(b"\n"):
                events.append(b"\n")
                data = data[1:]
        # A blank line may span two chunks. It starts in the last pending byte at the earliest.
        search_from = max(0, len(self._pending) - 1)
        self._pending += data
        start = 0
        while match := _BLANK_LINE.search(self._pending, search_from):
            search_from = match.end()
            events.append(bytes(self._pending[start:search_from]))
            start = search_from
        if start and start == len(self._pending):
            self._after_cr = self._pending.endswith(b"\r")
        del self._pending[:start]
        self._between_events = not (self._pending or self._after_cr)
        if len(self._pending) > MAX_EVENT_BYTES:
            raise EventTooLarge
        return events

    def take_rest(self) -> bytes:
        """The bytes after the last complete event, once."""
        rest = bytes(self._pending)
        self._pending.clear()
        return rest


@dataclass(slots=True)
class ParsedEvent:
    """One event: its raw bytes, its type, its data, the JSON object in its data (None without one), and its error."""

    raw: bytes
    name: bytes
    data: bytes
    chunk: dict[str, Any] | None
    error: dict[str, Any] | None

    @classmethod
    def of(cls, event: bytes) -> ParsedEvent:
        """Parse one raw event."""
        name, data = event_fields(event)
        chunk = parse_data(data)
        # A type or a member of this name: most events have neither.
        may_fail = name or data.find(b"error") >= 0
        return cls(event, name, data, chunk, error_in(name, data, chunk) if may_fail else None)


def event_fields(event: bytes) -> tuple[bytes, bytes]:
    """The type and the data of one raw event: its ``event`` field, and its ``data`` fields joined by newlines.

    Both are empty for a comment. Other fields are ignored. A byte order mark may open the stream, so it is skipped.
    """
    if event.startswith(b"data: ") and event.find(b"\n") == len(event) - 2 and event.find(b"\r") < 0:
        return b"", event[6:-2]  # Most events are one line of data.
    name = b""
    data: list[bytes] = []
    for line in event.removeprefix(_BYTE_ORDER_MARK).splitlines():
        field, _, value = line.partition(b":")
        if field == b"data":
            data.append(value.removeprefix(b" "))
        elif field == b"event":
            name = value.removeprefix(b" ")
    return name, b"\n".join(data)


def parse_data(data: bytes) -> dict[str, Any] | None:
    """The JSON object in an event's data, or None if it has none (a comment, ``[DONE]``, invalid JSON)."""
    if data.startswith(b"["):
        return None  # Not an object. For ``[DONE]``, raising the parser's error would cost more than parsing.
    try:
        parsed = orjson.loads(data)
    except orjson.JSONDecodeError:
        return None
    return parsed if isinstance(parsed, dict) else None


def event_type(name: bytes, chunk: dict[str, Any] | None) -> str:
    """The type of an event: its ``event`` field, or the ``type`` in its data."""
    if name:
        return name.decode(errors="replace")
    return str(chunk.get("type", "")) if chunk is not None else ""
