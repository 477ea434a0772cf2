"""Splits an OpenAI event stream into events and counts its output tokens, mostly without parsing.

The bytes pass through unchanged. The counter parses the events up to the first token, events that end a sequence, and
events with usage. Two short byte searches classify all other events.
"""

from __future__ import annotations

import re
from enum import Enum, auto
from typing import Any

import orjson

from engine_adapter.engine import TokenObserver

_BLANK_LINE = re.compile(rb"\n\r?\n")
# Quotes inside JSON strings are escaped, so these never match inside generated text.
_FINISHED = re.compile(rb'"finish_reason"\s*:\s*"')
_NO_CHOICES = re.compile(rb'"choices"\s*:\s*\[\s*\]')


class SSESplitter:
    """Splits a byte stream into complete server-sent events, independent of network chunks.

    INVARIANT: the raw bytes of all events plus `rest` are the bytes fed so far.

    Lines end in LF or CRLF. NOTE: a lone CR does not end a line. The specification allows it, but no known server
    sends it.
    """

    def __init__(self) -> None:
        self._pending = b""

    def feed(self, data: bytes) -> list[bytes]:
        """The events completed by ``data``, each with its closing blank line."""
        if not self._pending and data.endswith(b"\n\n") and data.find(b"\n") == data.rfind(b"\n", 0, -1):
            # Fast path: the chunk is exactly one event of one line.
            return [data]
        # A blank line may span two chunks. It starts in the last two pending bytes at the earliest.
        search_from = max(0, len(self._pending) - 2)
        buffer = self._pending + data if self._pending else data
        events: list[bytes] = []
        start = 0
        while match := _BLANK_LINE.search(buffer, max(start, search_from)):
            events.append(buffer[start : match.end()])
            start = match.end()
        self._pending = buffer[start:]
        return events

    @property
    def rest(self) -> bytes:
        """Bytes after the last complete event."""
        return self._pending


def event_data(event: bytes) -> bytes:
    """The ``data:`` lines of one raw event, joined by newlines; empty for a comment or a keep-alive."""
    lines = (line.removesuffix(b"\r") for line in event.split(b"\n"))
    return b"\n".join(line[5:].removeprefix(b" ") for line in lines if line.startswith(b"data:"))


def parse_event(event: bytes) -> dict[str, Any] | None:
    """The JSON object in one raw event, or None if it has none (a comment, ``[DONE]``, invalid JSON)."""
    try:
        parsed = orjson.loads(event_data(event))
    except orjson.JSONDecodeError:
        return None
    return parsed if isinstance(parsed, dict) else None


def shows_output(choice: dict[str, Any]) -> bool:
    """Whether a chunk's choice has generated output: text, reasoning, a tool call or a refusal."""
    if choice.get("text"):
        return True
    delta = choice.get("delta")
    return isinstance(delta, dict) and any(value for key, value in delta.items() if key != "role")


class EventKind(Enum):
    """Kind of one event in a completion stream."""

    TOKEN = auto()
    USAGE = auto()
    """The usage chunk: it has no choices and ends a stream requested with ``include_usage``."""
    DONE = auto()
    OTHER = auto()
    """A role chunk, a comment, an error, or the end of a sequence."""


class TokenCounter:
    """Counts the output tokens of one completion stream and reports them to a `TokenObserver`.

    An event with a choice counts as one token, with these exceptions:

    * NOTE: the role chunk is not a token.
    * NOTE: an empty event that ends its sequence is a token for some servers and not for others. vLLM sends the
      end-of-sequence token this way. The count of such an event is deferred to the usage chunk.
    * An event may have several tokens. The usage chunk corrects the total.

    Args:
        observer: receives the tokens.
        several: the stream may have more than one sequence, so every event is parsed for its choice index.

    Attributes:
        usage: the stream's usage object, once received.
        counted: tokens reported so far, by sequence.
        total: sum of ``counted``.
    """

    def __init__(self, observer: TokenObserver, several: bool = False) -> None:
        self._observer = observer
        self._several = several
        self._last: tuple[str, float] | None = None
        self._empty_ends: dict[str, float] = {}
        self._settled = False
        self.counted: dict[str, int] = {}
        self.total = 0
        self.usage: dict[str, Any] | None = None

    def see(self, event: bytes, at: float) -> EventKind:
        """Count one raw event that arrived at ``at`` (monotonic s), and return its kind."""
        if self.total and not self._several and b'"choices"' in event:
            # Hot path: a token of the only sequence.
            if not _FINISHED.search(event) and not _NO_CHOICES.search(event):
                self._report("0", 1, at)
                return EventKind.TOKEN
        elif event_data(event).strip() == b"[DONE]":
            self.settle()
            return EventKind.DONE
        return self._see_parsed(parse_event(event), at)

    def settle(self) -> None:
        """Correct the count by the usage at the end of the stream. Idempotent; `see` calls it on usage and ``[DONE]``.

        Missing tokens go first to the sequences that ended with an empty event, at the time of that event. The others
        go to the last sequence, at the time of its last token. A usage below the count changes nothing, because
        observers only add tokens. (Servers that split tokens over events cause this.)
        """
        if self._settled:
            return
        self._settled = True
        if self.usage is None:
            return
        prompt, completion = self.usage.get("prompt_tokens"), self.usage.get("completion_tokens")
        if isinstance(prompt, int) and not self._several:
            self._observer.on_prompt("0", prompt)
        missing = completion - self.total if isinstance(completion, int) else 0
        for sequence, at in list(self._empty_ends.items())[: max(missing, 0)]:
            self._report(sequence, 1, at)
            missing -= 1
        if missing > 0 and self._last is not None:
            self._report(self._last[0], missing, self._last[1])

    def _see_parsed(self, chunk: dict[str, Any] | None, at: float) -> EventKind:
        if chunk is None or not isinstance(chunk.get("choices"), list):
            return EventKind.OTHER
        usage = chunk.get("usage")
        if isinstance(usage, dict):
            self.usage = usage
        if not chunk["choices"]:
            if not isinstance(usage, dict):
                return EventKind.OTHER
            self.settle()
            return EventKind.USAGE
        kind = EventKind.OTHER
        for choice in chunk["choices"]:
            if isinstance(choice, dict) and self._see_choice(choice, at):
                kind = EventKind.TOKEN
        return kind

    def _see_choice(self, choice: dict[str, Any], at: float) -> bool:
        sequence = str(choice.get("index", 0)) if self._several else "0"
        if not shows_output(choice):
            if choice.get("finish_reason"):
                self._empty_ends[sequence] = at
                return False
            delta = choice.get("delta")
            # A token without text (part of a character) still counts; a role chunk does not.
            if isinstance(delta, dict) and (not delta or "role" in delta):
                return False
        self._report(sequence, 1, at)
        return True

    def _report(self, sequence: str, count: int, at: float) -> None:
        self.total += count
        self.counted[sequence] = self.counted.get(sequence, 0) + count
        self._last = (sequence, at)
        self._observer.on_tokens(sequence, count, at)
