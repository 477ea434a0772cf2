"""Reading an OpenAI event stream without parsing it: where events end, and which of them are output tokens.

The bytes pass through untouched. Only the events up to the first token are parsed, and those that end a
sequence or carry the usage; every other event is told apart by two short byte searches.
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
    """Cuts a byte stream into whole server-sent events, whatever the network's chunks.

    The events' raw bytes, joined and followed by `rest`, are the bytes that were fed. Lines end in LF or
    CRLF; a lone CR, which the specification also allows and no server we know sends, does not end a line.
    """

    def __init__(self) -> None:
        self._pending = b""

    def feed(self, data: bytes) -> list[bytes]:
        """The events that ``data`` completes, each with its closing blank line."""
        if not self._pending and data.endswith(b"\n\n") and data.find(b"\n") == data.rfind(b"\n", 0, -1):
            # The usual case: one read is one event of one line.
            return [data]
        # The blank line may straddle two chunks; nothing before the last two pending bytes can start one.
        look_from = max(0, len(self._pending) - 2)
        buffer = self._pending + data if self._pending else data
        events: list[bytes] = []
        start = 0
        while match := _BLANK_LINE.search(buffer, max(start, look_from)):
            events.append(buffer[start : match.end()])
            start = match.end()
        self._pending = buffer[start:]
        return events

    @property
    def rest(self) -> bytes:
        """Bytes after the last whole event."""
        return self._pending


def event_data(event: bytes) -> bytes:
    """The ``data:`` lines of one raw event, joined by newlines; empty for a comment or a keep-alive."""
    lines = (line.removesuffix(b"\r") for line in event.split(b"\n"))
    return b"\n".join(line[5:].removeprefix(b" ") for line in lines if line.startswith(b"data:"))


def parse_event(event: bytes) -> dict[str, Any] | None:
    """The JSON object in one raw event, or None when it holds none (a comment, ``[DONE]``, broken JSON)."""
    try:
        parsed = orjson.loads(event_data(event))
    except orjson.JSONDecodeError:
        return None
    return parsed if isinstance(parsed, dict) else None


def shows_output(choice: dict[str, Any]) -> bool:
    """Whether a chunk's choice carries something generated: text, reasoning, a tool call, a refusal."""
    if choice.get("text"):
        return True
    delta = choice.get("delta")
    return isinstance(delta, dict) and any(value for key, value in delta.items() if key != "role")


class EventKind(Enum):
    """What one event of a stream is."""

    TOKEN = auto()
    USAGE = auto()
    """The chunk with no choices that closes a stream asked for its usage."""
    DONE = auto()
    OTHER = auto()
    """A role chunk, a comment, an error, or the end of a sequence."""


class TokenCounter:
    """Counts the output tokens of one completion stream and tells a `TokenObserver`.

    An event with a choice is taken for one token. Exceptions: the role chunk is none, and an empty event that
    ends its sequence is one for some servers (vLLM sends the end-of-sequence token so) and none for others,
    so it waits for the usage chunk. That chunk also sets right the streams where an event holds several
    tokens. ``several`` says that the stream may hold more than one sequence; then each event is parsed for
    its choice index.

    ``usage`` is the stream's usage object once seen; ``counted`` the tokens told so far, by sequence;
    ``total`` their sum.
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
        """Take in one raw event that arrived at ``at`` (monotonic s)."""
        if self.total and not self._several and b'"choices"' in event:
            # The hot path: one token of the only sequence.
            if not _FINISHED.search(event) and not _NO_CHOICES.search(event):
                self._tell("0", 1, at)
                return EventKind.TOKEN
        elif event_data(event).strip() == b"[DONE]":
            self.settle()
            return EventKind.DONE
        return self._see_parsed(parse_event(event), at)

    def settle(self) -> None:
        """The stream is over: count what is not yet. Idempotent; `see` calls it on usage and ``[DONE]``.

        With a usage, tokens missing from the count are told at the time of the sequence's last token, first
        to the sequences whose end came in an empty event. A usage below the count (a server that splits
        tokens over events)
        changes nothing: observers only add.
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
            self._tell(sequence, 1, at)
            missing -= 1
        if missing > 0 and self._last is not None:
            self._tell(self._last[0], missing, self._last[1])

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
            # A token may detokenise to nothing yet (half a character); announcing the role is no token.
            if isinstance(delta, dict) and (not delta or "role" in delta):
                return False
        self._tell(sequence, 1, at)
        return True

    def _tell(self, sequence: str, count: int, at: float) -> None:
        self.total += count
        self.counted[sequence] = self.counted.get(sequence, 0) + count
        self._last = (sequence, at)
        self._observer.on_tokens(sequence, count, at)
