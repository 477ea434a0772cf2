"""How each API shapes an error: as a whole response, and as the last event of a stream that has started."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import orjson

from gateway.api.errors import ApiError

_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    529: "overloaded_error",
}
"""The Anthropic API's error type by status. Other 4xx are ``invalid_request_error``, other 5xx ``api_error``."""

_TEXT_BYTES = 1000
"""Bytes of an error without structure that become its message."""

_ANTHROPIC_KINDS = {*_ANTHROPIC_TYPES.values(), "api_error"}


@dataclass(frozen=True, slots=True)
class ErrorShape:
    """The error format of one API.

    ``body(error, request_id)`` returns a JSON document. ``last_events(body, sent)`` returns such a document as the last
    events of a stream; ``sent`` is the number of messages that the stream had so far. ``adapted(body, status,
    request_id)`` returns an engine's error document in this format; None if engines always send this format.
    """

    body: Callable[[ApiError, bytes], bytes]
    last_events: Callable[[bytes, int], bytes]
    adapted: Callable[[bytes, int, bytes], bytes] | None = None

    def event(self, error: ApiError, request_id: bytes, sent: int) -> bytes:
        """Return ``error`` as the last events of a stream."""
        return self.last_events(self.body(error, request_id), sent)


def _openai_body(error: ApiError, request_id: bytes) -> bytes:
    return error.body()


def _openai_events(body: bytes, sent: int) -> bytes:
    return b"data: " + body + b"\n\ndata: [DONE]\n\n"


def _responses_events(body: bytes, sent: int) -> bytes:
    """Return an ``error`` event of the Responses API.

    Its schema has the members at the top. OpenAI's clients raise an exception only for an ``error`` object, which the
    API sends too. NOTE: ``sequence_number`` is exact if every message of the stream was one event.
    """
    error = orjson.loads(body).get("error")
    details = error if isinstance(error, dict) else {}
    members = {name: details.get(name) for name in ("code", "message", "param")}
    return _error_event(orjson.dumps({"type": "error", **members, "sequence_number": sent, "error": error}))


def _error_event(body: bytes, sent: int = 0) -> bytes:
    return b"event: error\ndata: " + body + b"\n\n"


def _anthropic_type(status: int) -> str:
    return _ANTHROPIC_TYPES.get(status, "api_error" if status >= 500 else "invalid_request_error")


def _anthropic_body(error: ApiError, request_id: bytes) -> bytes:
    return _anthropic_document(_details(error, _anthropic_type(error.status)), request_id)


def _anthropic_document(details: dict[str, Any], request_id: bytes) -> bytes:
    return orjson.dumps({"type": "error", "error": details, "request_id": request_id.decode()})


def _anthropic_adapted(body: bytes, status: int, request_id: bytes) -> bytes:
    """vLLM answers invalid bodies in OpenAI's format, and uses its own error types in Anthropic's.

    Other servers have formats of their own, or none.
    """
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError:
        document = None
    error = document.get("error") if isinstance(document, dict) else None
    if isinstance(error, dict):
        if error.get("type") in _ANTHROPIC_KINDS:
            return body
        details = error
    else:
        text = _error_text(document) if isinstance(document, dict) else body[:_TEXT_BYTES].decode(errors="replace")
        is_text = text[:1] not in ("<", "[", "")
        details = {"message": text if is_text else f"The engine answered with status {status}."}
    return _anthropic_document({**details, "type": _anthropic_type(status)}, request_id)


def _error_text(document: dict[str, Any]) -> str:
    """Return the message of an error without an object for it: ``error``, ``message``, or FastAPI's ``detail``."""
    given = document.get("error") or document.get("message") or document.get("detail")
    if isinstance(given, list) and given and isinstance(given[0], dict):
        given = given[0].get("msg")
    return given if isinstance(given, str) else ""


def _details(error: ApiError, kind: str) -> dict[str, Any]:
    return {"type": kind, "message": error.message, "param": error.param, "code": error.code, **error.extra}


OPENAI = ErrorShape(_openai_body, _openai_events)
RESPONSES = ErrorShape(_openai_body, _responses_events)
ANTHROPIC = ErrorShape(_anthropic_body, _error_event, _anthropic_adapted)
