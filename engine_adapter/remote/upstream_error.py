"""Errors that a server reports inside a response with status 200."""

from __future__ import annotations

from typing import Any

Json = dict[str, Any]

_MESSAGE_CHARS = 1000
"""Characters of an error text without structure that are passed on."""


_CLIENT_TYPES = frozenset(("invalid_request_error", "BadRequestError", "invalid_prompt"))
"""Values of ``type`` or ``code`` of an error about the request. It would fail on any engine."""

_TGI_TYPES = {"validation": "invalid_request_error"}
"""OpenAI's name for an ``error_type`` of text-generation-inference."""


def error_in(name: bytes, data: bytes, document: Json | None) -> Json | None:
    """The error that an event or a JSON document reports, in the form of the ``error`` member of OpenAI's errors.

    Recognised are a true ``error`` member, ``"object": "error"``, ``"type": "error"`` and the event type ``error``.
    None if there is no error.

    Args:
        name: the event's type; empty for a document.
        data: the event's data; used only if it is not a JSON object.
        document: the parsed data.
    """
    if document is None:
        return _error(data[: 4 * _MESSAGE_CHARS].decode(errors="replace")) if name == b"error" else None
    error = document.get("error")
    if isinstance(error, dict) and error:
        return error
    if error:
        kind = document.get("error_type")
        return _error(str(error)) | ({"type": _TGI_TYPES.get(kind, kind)} if isinstance(kind, str) else {})
    if name == b"error" or document.get("object") == "error" or document.get("type") == "error":
        message = document.get("message") or document.get("detail")
        fields = {key: document[key] for key in ("type", "param", "code") if document.get(key) not in (None, "error")}
        return _error(str(message or "The server reported an error without a message.")) | fields
    return None


def error_status(error: Json) -> int:
    """The HTTP status for an error: its code if that is 400 to 599, else 400 if it is about the request, else 500."""
    for key in ("code", "status", "status_code"):
        code = error.get(key)
        if isinstance(code, str) and len(code) == 3 and code.isdecimal():
            code = int(code)
        if isinstance(code, int) and 400 <= code <= 599:
            return code
    about_request = any(error.get(key) in _CLIENT_TYPES for key in ("type", "code") if isinstance(error.get(key), str))
    return 400 if about_request else 500


def _error(message: str) -> Json:
    return {"message": message[:_MESSAGE_CHARS], "type": "engine_error", "param": None, "code": None}
