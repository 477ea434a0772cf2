"""Routes under ``/v1`` that are not scheduled. Their requests go to an engine without the gateway's own fields.

They use the engine too, so only a limited number runs at a time, and the others wait. Tenants share these slots.
"""

from __future__ import annotations

import asyncio
import re
from urllib.parse import parse_qsl

from prometheus_client import Gauge
from starlette.datastructures import Headers as HeaderView

from engine_adapter.asgi import BodyTooDeep, ClientDisconnected, DisconnectWatch, encode_json
from engine_adapter.engine import Engine, Message, Scope, Send
from gateway.api.auth import ApiKey
from gateway.api.body_fields import GUARDED_FIELDS, FieldGuard
from gateway.api.engine_call import ClientStalled
from gateway.api.errors import bad_request
from gateway.api.http_request import HttpRequest
from gateway.api.rejections import queue_full
from gateway.api.request_body import check_with_engine, document_for_engine, engine_scope, parse_json, too_deep
from gateway.api.shared_limit import SharedLimit, Sharer

WAIT_S = 60.0
"""Longest wait of a call (s) for its turn at an engine. Convention."""

_CHECKED_FIELDS = GUARDED_FIELDS | {"seed", "vllm_xargs"}
"""Fields that an engine may read on any route, and that a client may not set freely."""

# A form field and its name. `name*` and `name*0` may encode any name (RFC 2231).
_FORM_FIELD = re.compile(rb';[ \t]*(?i:name)[ \t]*(?:=[ \t]*"?([A-Za-z_]+)\b|(\*))')
_MAX_FORM_FIELDS = 1000
"""Limit on the fields of an url-encoded form. Convention."""

_NOT_UTF8 = re.compile(r';[ \t]*charset(?!="?utf-?8"?[ \t]*(?:;|$))', re.IGNORECASE)


class PassThrough:
    """Sends requests to engines past their queues.

    Args:
        limit: calls that one engine serves at a time; more wait. A GET only reads, so it is not limited.
        stall_s: seconds after which a client that accepts no data counts as disconnected.
        serving: a gauge of the limited calls that run, with the label ``engine``.
    """

    def __init__(self, limit: int, stall_s: float, serving: Gauge) -> None:
        self._limit = limit
        self._stall_s = stall_s
        self._serving = serving
        self._slots: dict[str, SharedLimit] = {}

    def set_limits(self, limit: int, stall_s: float) -> None:
        """Replace the limits. Calls that run continue, and count."""
        self._stall_s = stall_s
        self._limit = limit
        for slots in self._slots.values():
            slots.limit = limit
            slots.wake()

    async def serve(
        self, http: HttpRequest, body: bytes, engine: Engine, send: Send, key: ApiKey, guard: FieldGuard
    ) -> None:
        """Have ``engine`` answer the request through ``send``, in its turn. ``guard`` applies the rights of ``key``.

        Raises:
            ApiError: 400 for a field that no engine may receive; 429 after `WAIT_S` without a turn.
            ClientDisconnected: the client disconnected before a response started, or stalled.
            EngineLost: the engine died, or was down already.
        """
        body = checked_body(http.scope, http.headers, body, engine, key, guard)
        client = DisconnectWatch(http.receive, http.disconnected)
        try:
            if http.scope["method"] in ("GET", "HEAD"):
                await self._call(http, body, engine, client, send)
                return
            slots = self._slots.get(engine.name)
            if slots is None:
                slots = self._slots[engine.name] = SharedLimit(self._limit)
            if not slots.try_take(http.sharer):
                await self._wait(slots, http.sharer, client)
            try:
                with self._serving.labels(engine.name).track_inprogress():
                    await self._call(http, body, engine, client, send)
            finally:
                slots.free(http.sharer)
        finally:
            client.close()

    async def _call(self, http: HttpRequest, body: bytes, engine: Engine, client: DisconnectWatch, send: Send) -> None:
        stalled = False

        async def send_in_time(message: Message) -> None:
            nonlocal stalled
            try:
                async with asyncio.timeout(self._stall_s):
                    await send(message)
            except TimeoutError:
                stalled = True
                raise ClientStalled from None

        try:
            scope = engine_scope(http.scope, http.request_id, len(body))
            await engine.app(scope, client.receive_for(body), send_in_time)
        except Exception as error:
            # An engine's app may wrap the exception of `send`.
            if stalled:
                raise ClientStalled from error
            raise
        if stalled:
            raise ClientStalled
        if not http.response_started and client.disconnected.done():
            raise ClientDisconnected

    async def _wait(self, slots: SharedLimit, sharer: Sharer, client: DisconnectWatch) -> None:
        """Take a slot, in order of arrival among the calls of ``sharer``."""
        turn = asyncio.ensure_future(slots.acquire(sharer))
        try:
            await asyncio.wait({turn, client.disconnected}, timeout=WAIT_S, return_when=asyncio.FIRST_COMPLETED)
            if client.disconnected.done():
                raise ClientDisconnected
            if not turn.done():
                whose = "of this tenant " if slots.has_room() else ""
                message = f"The engine serves too many calls {whose}that are not scheduled (server.max_pass_through)."
                raise queue_full(message, self._limit, 1.0)
        except BaseException:
            if turn.done():
                slots.free(sharer)
            turn.cancel()
            raise


def checked_body(
    scope: Scope, headers: HeaderView, body: bytes, engine: Engine, key: ApiKey, guard: FieldGuard
) -> bytes:
    """Return ``body`` as it is, or without the members that only the gateway may set or that ``key`` may not send.

    Raises `ApiError` 400 for a body that an engine might read differently from the gateway. That is JSON which is not
    strictly JSON, but which Python's parser accepts: a byte order mark, UTF-16, ``NaN``, half a surrogate pair. It is
    also a form that may contain a checked field.
    """
    if not body:
        return body
    # An engine may use any one of several content-type headers, or read JSON without one.
    content_types = headers.getlist("content-type") or [""]
    media_types = {_media_type(given) for given in content_types}
    if any(given.startswith("multipart/") for given in media_types):
        _check_form(content_types, {name or star for name, star in _FORM_FIELD.findall(body)}, engine, key, guard)
    if "application/x-www-form-urlencoded" in media_types:
        _check_form(content_types, _urlencoded_names(body), engine, key, guard)
    if not any(_is_read_as_json(given) for given in content_types):
        return body
    document = parse_json(body)
    if not isinstance(document, dict) or (_CHECKED_FIELDS.isdisjoint(document) and not guard.isolates_prefixes):
        return body
    guard.apply(document, key)
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


def _urlencoded_names(body: bytes) -> set[bytes]:
    """Return the names of an url-encoded form's fields. Raises `ApiError` 400 for too many fields."""
    try:
        fields = parse_qsl(body, keep_blank_values=True, max_num_fields=_MAX_FORM_FIELDS)
    except ValueError:
        raise bad_request(f"A form has at most {_MAX_FORM_FIELDS} fields.", None) from None
    return {name for name, _ in fields}


def _check_form(content_types: list[str], names: set[bytes], engine: Engine, key: ApiKey, guard: FieldGuard) -> None:
    """Raise `ApiError` 400 for a form with a field that ``key`` may not send, ``vllm_xargs``, or an unsafe ``seed``.

    vLLM's transcriptions read ``vllm_xargs``.
    """
    # Another charset can spell the same field name with other bytes.
    if any(map(_NOT_UTF8.search, content_types)):
        raise bad_request("content-type: a form must be in UTF-8.", "content-type", "unsupported_parameter")
    if names & {b"vllm_xargs", b"*"}:
        raise bad_request(
            "vllm_xargs: not supported in a form. Send the form without it, and without `name*`.",
            "vllm_xargs",
            "unsupported_parameter",
        )
    guard.check_form((name.decode("latin-1") for name in names), key)
    if b"seed" in names:
        check_with_engine({"seed": 1}, engine)
