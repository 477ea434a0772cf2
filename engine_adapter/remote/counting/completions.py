"""Counts ``/chat/completions`` and ``/completions``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import repeat

import orjson

from engine_adapter.engine import TokenObserver
from engine_adapter.remote.counting.output_text import output_text, shows_output
from engine_adapter.remote.counting.token_counter import Batch, EventKind, Json, TokenCounter
from engine_adapter.remote.sse import ParsedEvent
from engine_adapter.remote.text_events import TextEvents
from engine_adapter.remote.usage import Usage, completions_usage

# Looking a member up in its class costs more than comparing it.
_TOKEN, _OTHER = EventKind.TOKEN, EventKind.OTHER

# Quotes inside JSON strings are escaped, so these never match inside generated text.
_UNFINISHED = b'"finish_reason":null'
_FINISHED = re.compile(rb'"finish_reason"\s*:\s*"')
_NO_CHOICES = re.compile(rb'"choices"\s*:\s*(?:\[\s*\]|null)')


def _is_unfinished(event: bytes) -> bool:
    return event.find(b'"choices"') >= 0 and not _FINISHED.search(event) and not _NO_CHOICES.search(event)


class CompletionCounter(TokenCounter):
    """Counts ``/chat/completions`` and ``/completions``.

    A few byte searches recognise an event with a token. The first events and one in `SAMPLED_EVERY` of the others are
    measured by their text, which `TextEvents` finds in most of them. The counter parses the rest, such as events with a
    finish reason or usage. With several sequences, it parses every event for its choice index.

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
        self.texts = TextEvents()

    def see(self, event: bytes, at: float) -> EventKind:
        """Count one raw event that arrived at ``at`` (monotonic s), and return its kind."""
        if self.is_plain_token(event):
            return self.see_plain_token(event, at)
        return self.see_parsed(ParsedEvent.of(event), at)

    def is_plain_token(self, event: bytes) -> bool:
        """As `TokenCounter.is_plain_token`."""
        if (
            self.total < self._next_sample
            # Only one line of data: the searches below do not see JSON that continues on another line.
            and event.find(b"\n") >= len(event) - 3
            # Most servers write `_UNFINISHED`, near the end of an event. Other spellings need slower searches.
            and (event.rfind(_UNFINISHED) > 0 or _is_unfinished(event))
            # NOTE: `in` costs twice as much, because it tries to read the text as a number first.
            and event.find(b'"error"') < 0
        ):
            return True
        return self.texts.text_of(event) is not None

    def see_plain_token(self, event: bytes, at: float) -> EventKind:
        """As `TokenCounter.see_plain_token`."""
        if self.total >= self._next_sample and (text := self.texts.text_of(event)) is not None:
            self._sample([text])
        self._report("0", 1, at)
        return _TOKEN

    def see_all(self, events: list[bytes], at: float) -> Batch:
        """As `TokenCounter.see_all`. Events that differ in their text only are counted together."""
        if len(events) == 1:
            return [(self.see(events[0], at), events[0])]
        batch: Batch = []
        while not self.ended and (first := len(batch)) < len(events):
            texts = self.see_texts(events, at, first)
            if texts:
                batch += zip(repeat(_TOKEN), events[first : first + len(texts)], strict=False)
            else:
                batch.append((self.see(events[first], at), events[first]))
        return batch

    def see_texts(self, events: Sequence[bytes], at: float, first: int = 0) -> list[bytes]:
        """Count ``events`` from number ``first`` on that differ from an earlier one in their text only.

        Return their texts, up to the first event that is not of this kind.
        """
        texts = self.texts.texts_of(events, first)
        if texts:
            if self._next_sample < self.total + len(texts):
                self._sample(texts)
            self._report("0", len(texts), at)
        return texts

    def see_parsed(self, event: ParsedEvent, at: float) -> EventKind:
        """As `see`, for an event that is parsed for another reason."""
        if event.data.startswith(b"[DONE]"):
            return self._end(EventKind.DONE)
        chunk, self.error = event.chunk, event.error
        if self.error is not None:
            return self._end(EventKind.ERROR)
        if chunk is None:
            return _OTHER
        # Some servers leave the choices of the usage chunk out, or write null.
        choices, usage = chunk.get("choices"), chunk.get("usage")
        if isinstance(usage, dict):
            self.usage = self._read_usage(usage)
            if not choices:
                self.settle()
                return EventKind.USAGE
        kind = _OTHER
        for choice in choices if isinstance(choices, list) else ():
            if isinstance(choice, dict) and self._see_choice(choice, at):
                kind = _TOKEN
        if kind is _TOKEN and not self._several:
            self.texts.learn(event)
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
            self._sample([output_text(choice).encode(errors="replace")])
        if self._several:
            self._next_sample = 0
        self._report(sequence, 1, at)
        return True

    def _sequence_of(self, choice: Json) -> str:
        """The sequence of a choice. An impossible index counts as the first, so a server cannot invent sequences."""
        if not self._several:
            return "0"
        index = str(choice.get("index") or 0)
        return index if index.isdecimal() and int(index[:9]) < self._sequences else "0"

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
