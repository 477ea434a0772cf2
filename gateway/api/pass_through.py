"""Routes under ``/v1`` that are not scheduled. Their requests go to an engine without the gateway's own fields."""

from __future__ import annotations

import re

from starlette.datastructures import Headers as HeaderView

from engine_adapter.asgi import BodyTooDeep, ClientConnection, ClientDisconnected, encode_json
from engine_adapter.engine import Engine, Scope, Send
from gateway.api.errors import bad_request
from gateway.api.http_request import HttpRequest
from gateway.api.request_body import check_with_engine, document_for_engine, engine_scope, parse_json, too_deep

_CHECKED_FIELDS = frozenset(("seed", "vllm_xargs"))
"""Fields that an engine may read on any route, and that a client may not set freely."""

# A form field with a checked name. `name*` and `name*0` may encode any name (RFC 2231).
_CHECKED_FORM_FIELD = re.compile(rb';[ \t]*(?i:name)[ \t]*(?:=[ \t]*"?(seed|vllm_xargs)\b|(\*))')
_NOT_UTF8 = re.compile(r';[ \t]*charset(?!="?utf-?8"?[ \t]*(?:;|$))', re.IGNORECASE)


async def pass_through(http: HttpRequest, body: bytes, engine: Engine, send: Send) -> None:
    """Have ``engine`` answer the request through ``send``.

    Raises:
        ApiError: 400 for a field that no engine may receive.
        ClientDisconnected: the client disconnected before a response started.
        EngineLost: the engine died, or was down already.
    """
    body = checked_body(http.scope, http.headers, body, engine)
    client = ClientConnection(http.receive)
    try:
        await engine.app(engine_scope(http.scope, http.request_id, len(body)), client.receive_for(body), send)
        if not http.response_started and client.disconnected.done():
            raise ClientDisconnected
    finally:
        client.close()


def checked_body(scope: Scope, headers: HeaderView, body: bytes, engine: Engine) -> bytes:
    """Return ``body`` as it is, or without the members that only the gateway may set.

    Raises `ApiError` 400 for a body that an engine might read differently from the gateway. That is JSON which is not
    strictly JSON, but which Python's parser accepts: a byte order mark, UTF-16, ``NaN``, half a surrogate pair. It is
    also a form that may contain a checked field.
    """
    if scope["method"] != "POST" or not body:
        return body
    # An engine may use any one of several content-type headers, or read JSON without one.
    content_types = headers.getlist("content-type") or [""]
    if any(_media_type(given).startswith("multipart/") for given in content_types):
        _check_form(content_types, body, engine)
    if not any(_is_read_as_json(given) for given in content_types):
        return body
    document = parse_json(body)
    if not isinstance(document, dict) or not _CHECKED_FIELDS & document.keys():
        return body
    check_with_engine(document, engine)
    try:
        return encode_json(document_for_engine(document))
    except BodyTooDeep:
        raise too_deep() from None


def _media_type(content_type: str) -> str:
    return content_type.partition(";")[0].strip().lower()


def _is_read_as_json(content_type: str) -> bool:
    """Whether FastAPI, vLLM's framework, reads the body as JSON. Older versions do so without a content type too."""
    media_type = _media_type(content_type)
    return media_type in ("", "application/json") or re.fullmatch(r"application/.*\+json", media_type) is not None


def _check_form(content_types: list[str], body: bytes, engine: Engine) -> None:
    """Raise `ApiError` 400 for a form with ``vllm_xargs``, which vLLM's transcriptions read, or an unsafe ``seed``."""
    names = {field or star for field, star in _CHECKED_FORM_FIELD.findall(body)}
    # Another charset can spell the same field name with other bytes.
    if any(map(_NOT_UTF8.search, content_types)):
        raise bad_request("content-type: a form must be in UTF-8.", "content-type", "unsupported_parameter")
    if names & {b"vllm_xargs", b"*"}:
        raise bad_request(
            "vllm_xargs: not supported in a form. Send the form without it, and without `name*`.",
            "vllm_xargs",
            "unsupported_parameter",
        )
    if b"seed" in names:
        check_with_engine({"seed": 1}, engine)
