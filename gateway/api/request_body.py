"""What comes in and what goes on: reading a request with its limits, and making of it what an engine may see."""

from __future__ import annotations

import asyncio
import math
import re
import uuid
from typing import Any

import orjson
from starlette.datastructures import Headers as HeaderView

from engine_adapter.engine import GATE_XARG, TPOT_XARG, Engine, Receive, Scope
from gateway.api.errors import ApiError, Headers, bad_request

MAX_HEADERS = 128

BODY_S, BODY_BYTES_PER_S = 60.0, 1 << 20
"""A client has so many seconds to send its body, and one more for each so many bytes that a body may have."""

_SAFE_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
# Hop by hop, rewritten here, or the gateway's own business: none of it reaches the engine.
_NOT_FORWARDED = frozenset(
    (b"authorization", b"content-length", b"transfer-encoding", b"connection", b"x-request-id", b"expect")
)
# A field of a form that would go on unread: `name*` and `name*0` may spell any name (RFC 2231).
_READ_FIELD = re.compile(rb';[ \t]*(?i:name)[ \t]*(?:=[ \t]*"?(seed|vllm_xargs)\b|(\*))')
_FOREIGN_CHARSET = re.compile(r';[ \t]*charset(?!="?utf-?8"?[ \t]*(?:;|$))', re.IGNORECASE)


class ClientLeftError(Exception):
    """The client hung up; there is nobody to answer."""


def read_request_id(given: str | None) -> bytes:
    """The client's own id when it is harmless, else a new one."""
    if given is not None and _SAFE_ID.fullmatch(given):
        return given.encode()
    return uuid.uuid4().hex.encode()


async def read_body(headers: HeaderView, receive: Receive, limit: int) -> bytes:
    """The whole body; `ClientLeftError` when the client leaves first.

    `ApiError`: 413 beyond ``limit`` bytes, 408 when it takes longer than `BODY_S` and what ``limit`` adds.
    """
    declared = headers.get("content-length", "0")
    if len(declared) > 20 or not (declared.isascii() and declared.isdigit()) or int(declared) > limit:
        raise _too_large(limit)
    within_s = BODY_S + limit / BODY_BYTES_PER_S
    try:
        async with asyncio.timeout(within_s):
            return await _collect(receive, limit)
    except TimeoutError:
        raise _too_slow(within_s) from None


async def _collect(receive: Receive, limit: int) -> bytes:
    chunks: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientLeftError
        chunk = message.get("body", b"")
        size += len(chunk)
        if size > limit:
            raise _too_large(limit)
        chunks.append(chunk)
        if not message.get("more_body"):
            return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def _too_large(limit: int) -> ApiError:
    return bad_request(f"The body is larger than {limit} bytes.", None, "body_too_large", 413)


def _too_slow(within_s: float) -> ApiError:
    error = bad_request(
        f"The body did not come whole within {within_s:.0f} s. Send it again.", None, "body_timeout", 408
    )
    # Who stalls would else keep the connection, waited on for the rest of this body.
    error.headers.append((b"connection", b"close"))
    return error


def parse_body(body: bytes) -> dict[str, Any]:
    """The body as a JSON object; `ApiError` 400 when it is none."""
    document = _parse_json(body)
    if not isinstance(document, dict):
        raise bad_request("The body must be a JSON object.", None, "invalid_json")
    return document


def _parse_json(body: bytes) -> Any:
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        # NOTE: the decoder's message quotes no text, only what it expected and where.
        raise bad_request(
            f"The body is not JSON: {error.msg} at character {error.pos}.", None, "invalid_json"
        ) from None


def check_with_engine(document: dict[str, Any], engine: Engine) -> None:
    """`ApiError` 400 for what would harm the engine; may drop what has no effect."""
    refusal = engine.unsupported_reason(document)
    if refusal is not None:
        raise bad_request(refusal, refusal.partition(":")[0], "unsupported_parameter")


def body_for_engine(document: dict[str, Any], tpot_slo_s: float | None, gate: str = "") -> bytes:
    """The client's body with ``tpot_slo_s`` (None or infinite: no bound) for the step gate called ``gate``, if any.

    A client may send ``vllm_xargs`` of its own, but never ours: they would let it claim a pace it was not granted.
    """
    given = document.get("vllm_xargs")
    xargs = {k: v for k, v in given.items() if not k.startswith("antares_")} if isinstance(given, dict) else {}
    if gate:
        xargs[GATE_XARG] = gate
        if tpot_slo_s is not None and tpot_slo_s < math.inf:
            xargs[TPOT_XARG] = round(tpot_slo_s * 1000, 3)
    if xargs:
        document["vllm_xargs"] = xargs
    elif isinstance(given, dict):
        del document["vllm_xargs"]
    try:
        return orjson.dumps(document)
    except orjson.JSONEncodeError:
        # What nests deeper than orjson writes, it still reads.
        raise bad_request("The body nests too deeply.", None, "invalid_json") from None


def passed_on_body(scope: Scope, headers: HeaderView, body: bytes, engine: Engine) -> bytes:
    """The body of a route that is not scheduled: as it came, but for what must not reach an engine on any route.

    `ApiError` 400 for what an engine might read and the gateway cannot: JSON that is not strictly JSON (a byte order
    mark, UTF-16, `NaN`, half a surrogate pair), which Python's own parser takes; and such fields of a form.
    """
    if scope["method"] != "POST" or not body:
        return body
    # Whoever reads the request next may go by any of several, or take JSON where there is none.
    media_types = headers.getlist("content-type") or [""]
    if any(_media_type(given).startswith("multipart/") for given in media_types):
        _check_form(media_types, body, engine)
    if not any(_reads_as_json(given) for given in media_types):
        return body
    document = _parse_json(body)
    if not isinstance(document, dict) or not {"seed", "vllm_xargs"} & document.keys():
        return body
    check_with_engine(document, engine)
    return body_for_engine(document, None)


def _media_type(content_type: str) -> str:
    return content_type.partition(";")[0].strip().lower()


def _reads_as_json(content_type: str) -> bool:
    """Whether FastAPI, vLLM's framework, would read it as JSON; it once did without a content type too."""
    media_type = _media_type(content_type)
    return media_type in ("", "application/json") or re.fullmatch(r"application/.*\+json", media_type) is not None


def _check_form(content_types: list[str], body: bytes, engine: Engine) -> None:
    """`ApiError` 400 for a form with ``vllm_xargs``, which vLLM's transcriptions read, or with a harmful ``seed``."""
    named = {field or star for field, star in _READ_FIELD.findall(body)}
    # In another charset the names of the fields may read otherwise.
    if any(map(_FOREIGN_CHARSET.search, content_types)):
        raise bad_request("content-type: a form must be in UTF-8.", "content-type", "unsupported_parameter")
    if named & {b"vllm_xargs", b"*"}:
        raise bad_request(
            "vllm_xargs: not taken in a form. Send the form without it, and without `name*`.",
            "vllm_xargs",
            "unsupported_parameter",
        )
    if b"seed" in named:
        check_with_engine({"seed": 1}, engine)


def engine_scope(scope: Scope, request_id: bytes, content_length: int) -> Scope:
    """The ASGI scope that an engine's app is called with."""
    headers: Headers = [(k, v) for k, v in scope["headers"] if k.lower() not in _NOT_FORWARDED]
    headers += [(b"x-request-id", request_id), (b"content-length", str(content_length).encode())]
    # A fresh "state": the engine's app must not see or change ours.
    return {**scope, "headers": headers, "state": {}}
