"""Counts Anthropic's ``/messages``."""

from __future__ import annotations

from engine_adapter.engine import TokenObserver
from engine_adapter.remote.counting.output_text import strings
from engine_adapter.remote.counting.token_counter import EventKind, Json, TokenCounter
from engine_adapter.remote.sse import event_fields, event_type, parse_data
from engine_adapter.remote.upstream_error import error_in
from engine_adapter.remote.usage import Usage, messages_usage

_MESSAGES_USAGE = ("input_tokens", "output_tokens", "cache_read_input_tokens", "cache_creation_input_tokens")


class MessagesCounter(TokenCounter):
    """Counts Anthropic's ``/messages``: its ``content_block_delta`` events are tokens."""

    _error_starts = (b"event: error",)

    def __init__(self, observer: TokenObserver, sequences: int = 1) -> None:
        super().__init__(observer, sequences)
        self._usage_fields: Json = {}

    def is_plain_token(self, event: bytes) -> bool:
        """As `TokenCounter.is_plain_token`."""
        return (
            self.total < self._next_sample
            and event.startswith(b"event: content_block_delta\n")
            and event.find(b'"signature_delta"') < 0
        )

    def see(self, event: bytes, at: float) -> EventKind:
        """Count one raw event that arrived at ``at`` (monotonic s), and return its kind."""
        if self.is_plain_token(event):
            return self.see_plain_token(event, at)
        name, data = event_fields(event)
        chunk = parse_data(data)
        kind = event_type(name, chunk)
        if chunk is not None and kind == "content_block_delta":
            delta = chunk.get("delta")
            if not isinstance(delta, dict) or delta.get("type") == "signature_delta":
                return EventKind.OTHER
            text = "".join(strings([value for key, value in delta.items() if key != "type"]))
            self._sample([text.encode(errors="replace")])
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
        return "".join(strings(blocks)) if isinstance(blocks, list) else ""
