"""Counts ``/responses``."""

from __future__ import annotations

from engine_adapter.remote.counting.output_text import strings
from engine_adapter.remote.counting.token_counter import EventKind, Json, TokenCounter
from engine_adapter.remote.sse import event_fields, event_type, parse_data
from engine_adapter.remote.upstream_error import error_in
from engine_adapter.remote.usage import Usage, responses_usage


class ResponsesCounter(TokenCounter):
    """Counts ``/responses``: its ``*.delta`` events are tokens, and its last event has the usage."""

    _error_starts = (b"event: error", b"event: response.failed")

    def is_plain_token(self, event: bytes) -> bool:
        """As `TokenCounter.is_plain_token`."""
        return (
            self.total < self._next_sample
            and event.startswith(b"event: response.")
            and event.endswith(b".delta", 0, event.find(b"\n"))
        )

    def see(self, event: bytes, at: float) -> EventKind:
        """Count one raw event that arrived at ``at`` (monotonic s), and return its kind."""
        if self.is_plain_token(event):
            return self.see_plain_token(event, at)
        name, data = event_fields(event)
        chunk = parse_data(data)
        kind = event_type(name, chunk)
        if chunk is not None and kind.endswith(".delta"):
            delta = chunk.get("delta")
            self._sample([delta.encode(errors="replace") if isinstance(delta, str) else b""])
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
        return "".join(strings(items)) if isinstance(items, list) else ""
