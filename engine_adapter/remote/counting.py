"""Counts the output tokens of a response, mostly without parsing, and recognises its end and its errors.

One class per API counts its streams and its JSON documents: `CompletionCounter` for ``/chat/completions`` and
``/completions``, `ResponsesCounter` for ``/responses``, `MessagesCounter` for Anthropic's ``/messages``. The bytes pass
through unchanged.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from enum import Enum, auto
from typing import Any, ClassVar

import orjson

from engine_adapter.engine import TokenObserver
from engine_adapter.remote.sse import ParsedEvent, event_fields, parse_data
from engine_adapter.remote.token_estimate import estimated_tokens
from engine_adapter.remote.upstream_error import error_in
from engine_adapter.remote.usage import Usage, completions_usage, messages_usage, responses_usage

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

    def _sample(self, text: str) -> None:
        """Estimate the tokens of the event that is about to be reported."""
        self._samples += 1
        self._sampled_tokens += estimated_tokens(text)
        mean = self._sampled_tokens / self._samples
        self.tokens_per_event = mean if mean >= SEVERAL_TOKENS else 1.0
        self._next_sample = self.total + (1 if self.total < SAMPLED_FIRST else SAMPLED_EVERY)

    def _end(self, kind: EventKind) -> EventKind:
        self.ended = True
        self.settle()
        return kind


# Quotes inside JSON strings are escaped, so these never match inside generated text.
_UNFINISHED = b'"finish_reason":null'
_FINISHED = re.compile(rb'"finish_reason"\s*:\s*"')
_NO_CHOICES = re.compile(rb'"choices"\s*:\s*\[\s*\]')


def _is_unfinished(event: bytes) -> bool:
    return b'"choices"' in event and not _FINISHED.search(event) and not _NO_CHOICES.search(event)


class CompletionCounter(TokenCounter):
    """Counts ``/chat/completions`` and ``/completions``.

    A few byte searches recognise an event with a token. The counter parses the first events, one in `SAMPLED_EVERY` of
    the others, and events with a finish reason or usage. With several sequences, it parses every event for its choice
    index.

    * NOTE: the role chunk is not a token.
    * NOTE: an empty event that ends its sequence is a token for some servers and not for others. vLLM sends the
      end-of-sequence token this way. The count of such an event is deferred to the usage chunk.
    """

    done = b"data: [DONE]\n\n"
    _error_starts = (b'data: {"error"',)

    def __init__(self, observer: TokenObserver, sequences: int = 1) -> None:
        super().__init__(observer, sequences)
        self._empty_ends: dict[str, float] = {}
        self._finished: set[str] = set()

    def see(self, event: bytes, at: float) -> EventKind:
        """Count one raw event that arrived at ``at`` (monotonic s), and return its kind."""
        if (
            self.total < self._next_sample
            # Only one line of data: the searches below do not see JSON that continues on another line.
            and event.find(b"\n") >= len(event) - 3
            # Most servers write `_UNFINISHED`, near the end of an event. Other spellings need slower searches.
            and (event.rfind(_UNFINISHED) > 0 or _is_unfinished(event))
            and b'"error"' not in event
        ):
            # Hot path: a token of the only sequence.
            self._report("0", 1, at)
            return EventKind.TOKEN
        return self.see_parsed(ParsedEvent.of(event), at)

    def see_parsed(self, event: ParsedEvent, at: float) -> EventKind:
        """As `see`, for an event that is parsed for another reason."""
        if event.data.startswith(b"[DONE]"):
            return self._end(EventKind.DONE)
        chunk = event.chunk
        self.error = error_in(event.name, event.data, chunk)
        if self.error is not None:
            return self._end(EventKind.ERROR)
        if chunk is None or not isinstance(choices := chunk.get("choices"), list):
            return EventKind.OTHER
        usage = chunk.get("usage")
        if isinstance(usage, dict):
            self.usage = self._read_usage(usage)
        if not choices:
            if not isinstance(usage, dict):
                return EventKind.OTHER
            self.settle()
            return EventKind.USAGE
        kind = EventKind.OTHER
        for choice in choices:
            if isinstance(choice, dict) and self._see_choice(choice, at):
                kind = EventKind.TOKEN
        return kind

    @property
    def complete(self) -> bool:
        """Whether the stream has ended, or every sequence has a finish reason. Some servers send no ``[DONE]``."""
        return self.ended or len(self._finished) >= self._sequences

    @staticmethod
    def error_document(error: Json) -> Json:
        """An error response of the OpenAI API."""
        return {"error": error}

    def _usual_error(self, event: bytes) -> bytes:
        return b"data: " + orjson.dumps(self.error_document(self.error or {})) + b"\n\n"

    def _see_choice(self, choice: Json, at: float) -> bool:
        sequence = self._sequence_of(choice)
        finished = bool(choice.get("finish_reason"))
        if finished:
            self._finished.add(sequence)
        if not shows_output(choice):
            if finished:
                self._empty_ends[sequence] = at
                return False
            delta = choice.get("delta")
            # A token without text (part of a character) still counts; a role chunk does not.
            if isinstance(delta, dict) and (not delta or "role" in delta):
                return False
        if self.total >= self._next_sample:
            self._sample(output_text(choice))
        if self._several:
            self._next_sample = 0
        self._report(sequence, 1, at)
        return True

    def _sequence_of(self, choice: Json) -> str:
        """The sequence of a choice. An impossible index counts as the first, so a server cannot invent sequences."""
        index = str(choice.get("index") or 0)
        return index if self._several and index.isdecimal() and int(index[:9]) < self._sequences else "0"

    def _add_missing(self, missing: int) -> None:
        """Missing tokens go first to the sequences that ended with an empty event, at the time of that event."""
        for sequence, at in list(self._empty_ends.items())[: max(missing, 0)]:
            self._report(sequence, 1, at)
            missing -= 1
        super()._add_missing(missing)

    def _read_usage(self, raw: Json) -> Usage:
        return completions_usage(raw)

    def _document_text(self, document: Json) -> str:
        choices = document.get("choices")
        return "".join(output_text(c) for c in choices if isinstance(c, dict)) if isinstance(choices, list) else ""


class BatchCounter(CompletionCounter):
    """Counts ``/chat/completions/batch``: one document with the choices of several chats, and never a stream."""


class ResponsesCounter(TokenCounter):
    """Counts ``/responses``: its ``*.delta`` events are tokens, and its last event has the usage."""

    _error_starts = (b"event: error", b"event: response.failed")

    def see(self, event: bytes, at: float) -> EventKind:
        """Count one raw event that arrived at ``at`` (monotonic s), and return its kind."""
        if (
            self.total < self._next_sample
            and event.startswith(b"event: response.")
            and event.endswith(b".delta", 0, event.find(b"\n"))
        ):
            self._report("0", 1, at)
            return EventKind.TOKEN
        name, data = event_fields(event)
        chunk = parse_data(data)
        kind = _type_of(name, chunk)
        if chunk is not None and kind.endswith(".delta"):
            delta = chunk.get("delta")
            self._sample(delta if isinstance(delta, str) else "")
            self._report("0", 1, at)
            return EventKind.TOKEN
        response = chunk.get("response") if chunk is not None else None
        if isinstance(response, dict) and isinstance(usage := response.get("usage"), dict):
            self.usage = self._read_usage(usage)
        if kind in ("response.completed", "response.incomplete", "response.cancelled"):
            return self._end(EventKind.DONE)
        if kind == "response.failed":
            self.error = error_in(b"error", b"", response if isinstance(response, dict) else {})
        else:
            self.error = error_in(name, data, chunk)
        return EventKind.OTHER if self.error is None else self._end(EventKind.ERROR)

    @staticmethod
    def error_document(error: Json) -> Json:
        """An error response of the OpenAI API."""
        return {"error": error}

    def _read_usage(self, raw: Json) -> Usage:
        return responses_usage(raw)

    def _document_text(self, document: Json) -> str:
        items = document.get("output")
        return "".join(_strings(items)) if isinstance(items, list) else ""


class MessagesCounter(TokenCounter):
    """Counts Anthropic's ``/messages``: its ``content_block_delta`` events are tokens."""

    _error_starts = (b"event: error",)

    def __init__(self, observer: TokenObserver, sequences: int = 1) -> None:
        super().__init__(observer, sequences)
        self._usage_fields: Json = {}

    def see(self, event: bytes, at: float) -> EventKind:
        """Count one raw event that arrived at ``at`` (monotonic s), and return its kind."""
        if (
            self.total < self._next_sample
            and event.startswith(b"event: content_block_delta\n")
            and b'"signature_delta"' not in event
        ):
            self._report("0", 1, at)
            return EventKind.TOKEN
        name, data = event_fields(event)
        chunk = parse_data(data)
        kind = _type_of(name, chunk)
        if chunk is not None and kind == "content_block_delta":
            delta = chunk.get("delta")
            if not isinstance(delta, dict) or delta.get("type") == "signature_delta":
                return EventKind.OTHER
            self._sample("".join(_strings([value for key, value in delta.items() if key != "type"])))
            self._report("0", 1, at)
            return EventKind.TOKEN
        if chunk is not None:
            message = chunk.get("message") if kind == "message_start" else chunk
            if isinstance(message, dict) and isinstance(usage := message.get("usage"), dict):
                # The start has the prompt's counts, and each later event the new values of some counts.
                self._usage_fields |= {key: usage[key] for key in _MESSAGES_USAGE if usage.get(key) is not None}
                self.usage = messages_usage(self._usage_fields)
        if kind == "message_stop":
            return self._end(EventKind.DONE)
        self.error = error_in(name, data, chunk)
        return EventKind.OTHER if self.error is None else self._end(EventKind.ERROR)

    @staticmethod
    def error_document(error: Json) -> Json:
        """An error response of the Anthropic API."""
        return {"type": "error", "error": {"type": "api_error", "message": error.get("message", "")}}

    def _read_usage(self, raw: Json) -> Usage:
        return messages_usage(raw)

    def _document_text(self, document: Json) -> str:
        blocks = document.get("content")
        return "".join(_strings(blocks)) if isinstance(blocks, list) else ""


_MESSAGES_USAGE = ("input_tokens", "output_tokens", "cache_read_input_tokens", "cache_creation_input_tokens")

_COUNTERS: tuple[tuple[str, type[TokenCounter]], ...] = (
    ("/completions", CompletionCounter),
    ("/chat/completions/batch", BatchCounter),
    ("/v1/responses", ResponsesCounter),
    ("/v1/messages", MessagesCounter),
)


def counter_for(path: str) -> type[TokenCounter] | None:
    """The counter for a route that generates tokens; None for any other route."""
    return next((counter for suffix, counter in _COUNTERS if path.endswith(suffix)), None)


def shows_output(choice: Json) -> bool:
    """Whether a chunk's choice has generated output: text, reasoning, a tool call or a refusal."""
    if choice.get("text"):
        return True
    delta = choice.get("delta")
    return isinstance(delta, dict) and any(value for key, value in delta.items() if key != "role")


def output_text(choice: Json) -> str:
    """The generated text of a choice of a chunk or of a document."""
    message = choice.get("delta") or choice.get("message")
    if not isinstance(message, dict):
        return str(choice.get("text") or "")
    return "".join(_strings([value for key, value in message.items() if key != "role"]))


_NOT_GENERATED = frozenset(
    ("id", "type", "index", "role", "status", "object", "call_id", "signature", "encrypted_content")
)


def _strings(items: list[Any]) -> list[str]:
    """All strings in JSON values, except the members that a server adds to the generated text."""
    found: list[str] = []
    pending = list(items)
    while pending:
        item = pending.pop()
        if isinstance(item, str):
            found.append(item)
        elif isinstance(item, list):
            pending += item
        elif isinstance(item, dict):
            pending += [value for key, value in item.items() if key not in _NOT_GENERATED]
    return found


def _type_of(name: bytes, chunk: Json | None) -> str:
    """The type of an event: its ``event`` field, or the ``type`` in its data."""
    if name:
        return name.decode(errors="replace")
    return str(chunk.get("type", "")) if chunk is not None else ""
