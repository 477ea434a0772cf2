"""What the counters of all APIs share: corrections by the usage, and estimates from the text.

The bytes pass through unchanged, and most events are not parsed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from enum import Enum, auto
from typing import Any, ClassVar

from engine_adapter.engine import TokenObserver
from engine_adapter.remote.sse import event_fields
from engine_adapter.remote.token_estimate import estimated_tokens, tokens_of_events
from engine_adapter.remote.upstream_error import error_in
from engine_adapter.remote.usage import Usage

Json = dict[str, Any]

SEVERAL_TOKENS = 1.5
"""Estimated tokens per event from which a stream without usage counts its text instead of its events.

Measured with SmolLM2's tokenizer in eight languages and formats: events with one token are estimated at 1.0 to 1.1
tokens, events with four at 1.9 to 4.2."""

SAMPLED_FIRST, SAMPLED_EVERY = 8, 32
"""The first tokens of a stream, and every so many after them, are parsed for the length of their text."""


class EventKind(Enum):
    """Kind of one event in a response stream."""

    TOKEN = auto()
    USAGE = auto()
    """The usage chunk of a completion: it has no choices and ends a stream requested with ``include_usage``."""
    DONE = auto()
    """The event that ends the stream: ``[DONE]``, ``response.completed``, ``message_stop``."""
    ERROR = auto()
    """The server reports that it failed. Ends the stream too."""
    OTHER = auto()
    """A role chunk, a comment, or the end of a sequence."""


Batch = list[tuple[EventKind, bytes]]
"""Events with their kinds."""


class TokenCounter(ABC):
    """Counts the output tokens of one response and reports them to a `TokenObserver`.

    An event with output counts as one token. It may have several: the usage at the end corrects the total. Without
    usage, the total is estimated from the text if the events obviously have several tokens.

    Args:
        observer: receives the tokens.
        sequences: number of sequences that the request generates.

    Attributes:
        usage: the response's usage, once received.
        counted: tokens reported so far, by sequence.
        total: sum of ``counted``.
        error: the error that the server reported, in the form of the ``error`` member of OpenAI's errors.
        ended: the stream's last event has arrived.
        settled: `settle` has corrected the count.
        tokens_per_event: estimated tokens per event: 1, or the mean of the sampled texts if that is obviously more.
    """

    done: ClassVar[bytes] = b""
    """The usual form of the event that also follows an error; empty if none does."""
    _error_starts: ClassVar[tuple[bytes, ...]]
    """How an error event starts in the forms that clients and the gateway recognise."""

    def __init__(self, observer: TokenObserver, sequences: int = 1) -> None:
        self._observer = observer
        self._sequences = sequences
        self._several = sequences > 1
        self._last = ""
        self._last_at: dict[str, float] = {}
        self.settled = False
        self._next_sample = 0
        self._samples = self._sampled_tokens = 0
        self.counted: dict[str, int] = {}
        self.total = 0
        self.usage: Usage | None = None
        self.error: Json | None = None
        self.ended = False
        self.tokens_per_event = 1.0

    @abstractmethod
    def see(self, event: bytes, at: float) -> EventKind:
        """Count one raw event that arrived at ``at`` (monotonic s), and return its kind."""

    @abstractmethod
    def is_plain_token(self, event: bytes) -> bool:
        """Whether ``event`` is surely a token of the only sequence.

        Hot path: a few byte searches, and no parsing. It changes nothing.
        """

    def see_plain_token(self, event: bytes, at: float) -> EventKind:
        """Count an event for which `is_plain_token` is True, that arrived at ``at`` (monotonic s). Return its kind."""
        self._report("0", 1, at)
        return EventKind.TOKEN

    def see_all(self, events: list[bytes], at: float) -> Batch:
        """Count raw ``events`` that arrived together, and return them with their kinds, up to the stream's last one."""
        batch: Batch = []
        for event in events:
            batch.append((self.see(event, at), event))
            if self.ended:
                break
        return batch

    @property
    def complete(self) -> bool:
        """Whether the client has the whole response, or an error instead."""
        return self.ended

    def see_document(self, document: Json, at: float) -> None:
        """Count a response that is one JSON document, complete at ``at`` (monotonic s)."""
        self.error = error_in(b"", b"", document)
        self.ended = True
        usage = document.get("usage")
        if isinstance(usage, dict):
            self.usage = self._read_usage(usage)
        stated = self.usage and self.usage.completion
        if stated is None and self.error is None:
            text = self._document_text(document)
            stated = estimated_tokens(text) if text else None
        if stated:
            self._report("0", stated, at)
        self.settle()

    def settle(self) -> None:
        """Correct the count by the usage, or by the estimate, once the response has ended. Idempotent.

        Missing tokens are reported at the time of their sequence's last token. A usage below the count changes nothing,
        because observers only add tokens. (Servers that split tokens over events cause this.)
        """
        if self.settled:
            return
        self.settled = True
        usage = self.usage or Usage()
        if not self._several:
            if usage.prompt is not None:
                self._observer.on_prompt("0", usage.prompt)
            if usage.cached is not None:
                self._observer.on_cached("0", usage.cached)
        if usage.completion is not None:
            self._add_missing(usage.completion - self.total)
            return
        more = self.tokens_per_event - 1
        for sequence, events in list(self.counted.items()):
            if missing := round(events * more):
                self._report(sequence, missing, self._last_at[sequence])

    def error_event(self, event: bytes) -> bytes:
        """An error event as it is, or in the form that clients and the gateway recognise."""
        return event if event.startswith(self._error_starts) else self._usual_error(event)

    @staticmethod
    @abstractmethod
    def error_document(error: Json) -> Json:
        """The body of an error response in the shape of this API. ``error``: as in OpenAI's errors."""

    def _usual_error(self, event: bytes) -> bytes:
        """An error event with the type ``error``."""
        return b"event: error\ndata: " + event_fields(event)[1].replace(b"\n", b"\ndata: ") + b"\n\n"

    @abstractmethod
    def _read_usage(self, raw: Json) -> Usage:
        """The token counts in a ``usage`` object."""

    @abstractmethod
    def _document_text(self, document: Json) -> str:
        """The output text of a JSON response."""

    def _add_missing(self, missing: int) -> None:
        if missing > 0 and self._last:
            self._report(self._last, missing, self._last_at[self._last])

    def _report(self, sequence: str, count: int, at: float) -> None:
        self.total += count
        self.counted[sequence] = self.counted.get(sequence, 0) + count
        self._last = sequence
        self._last_at[sequence] = at
        self._observer.on_tokens(sequence, count, at)

    def _sample(self, texts: list[bytes]) -> None:
        """Estimate the tokens of those events that are due, of events with ``texts`` that are about to be reported."""
        first = max(self._next_sample - self.total, 0)
        # From there on, one in so many is due.
        later = max(first, SAMPLED_FIRST - self.total)
        due = texts[first:later] + texts[later::SAMPLED_EVERY]
        self._next_sample = self.total + max(first, min(len(texts), later))
        if later < len(texts):
            self._next_sample += SAMPLED_EVERY * len(texts[later::SAMPLED_EVERY])
        self._samples += len(due)
        self._sampled_tokens += tokens_of_events(due)
        mean = self._sampled_tokens / self._samples
        self.tokens_per_event = mean if mean >= SEVERAL_TOKENS else 1.0

    def _end(self, kind: EventKind) -> EventKind:
        self.ended = True
        self.settle()
        return kind
