"""Request bodies: read one within its limits, parse it once, and build what an engine is sent."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import orjson
from starlette.datastructures import Headers as HeaderView

from engine_adapter.asgi import receive_chunk
from engine_adapter.engine import GATE_XARG, KIND_XARG, TPOT_XARG, Engine, Receive, Scope
from engine_adapter.service_kind import ServiceKind, default_kind
from gateway.api.body_memory import FREE_BYTES, BodyReservation, no_memory
from gateway.api.content_encoding import TooLarge, content_coding, decompress
from gateway.api.errors import ApiError, Headers, bad_request
from gateway.api.limits import Limits

BODY_TIMEOUT_S, BODY_BYTES_PER_S = 60.0, 1 << 20
"""Time limit for a client to send its body: the timeout, plus the largest allowed body at this rate. Convention."""

OWN_XARGS_PREFIX = "antares_"
"""Prefix of the ``vllm_xargs`` that only the gateway sets."""

_MAX_LENGTH_DIGITS = 20
"""Digits of a content-length that are parsed; any longer number is above every limit."""

_MOST_EXPANDED = 1032
"""Largest ratio of plain to compressed size of deflate."""


_CREDENTIALS = frozenset((b"authorization", b"x-api-key", b"api-key", b"cookie", b"proxy-authorization"))
# The gateway answers cross-origin requests itself, and decompresses bodies.
_ANSWERED_HERE = frozenset((b"origin", b"content-encoding"))
# vLLM reads these as it reads the body fields `priority`, `session_id` and `data_parallel_rank`.
_GUARDED = frozenset((b"x-vllm-priority", b"x-session-id", b"x-data-parallel-rank"))
_NOT_FORWARDED = (
    frozenset((b"content-length", b"transfer-encoding", b"connection", b"x-request-id", b"expect"))
    | _CREDENTIALS
    | _ANSWERED_HERE
    | _GUARDED
)
"""Request headers that no engine receives."""


async def read_limited_body(
    headers: HeaderView,
    receive: Receive,
    max_bytes: int,
    memory: BodyReservation,
    limits: Limits,
    arrived: Callable[[int], bytes | None],
) -> bytes:
    """Return the whole body, decompressed. ``memory`` grows with it, and keeps its size.

    ``arrived``: returns the body, once, if it has arrived and is at most that many bytes.

    Raises:
        ApiError: 413 above ``max_bytes``, before or after decompression; 415 for an unsupported ``content-encoding``;
            400 for invalid compressed data; 408 after `BODY_TIMEOUT_S` plus the time for ``max_bytes``, or from a
            client that is too slow; 503 without memory.
        ClientDisconnected: the client disconnected first.
    """
    coding = content_coding(headers)
    declared = headers.get("content-length", "0")
    is_number = declared.isascii() and declared.isdigit() and len(declared) <= _MAX_LENGTH_DIGITS
    if not is_number or int(declared) > max_bytes:
        raise _too_large(max_bytes)
    if not coding and (whole := arrived(min(FREE_BYTES, max_bytes))) is not None:
        return whole
    until = asyncio.get_running_loop().time() + BODY_TIMEOUT_S + max_bytes / BODY_BYTES_PER_S
    try:
        async with asyncio.timeout(None) as timer:
            body = await _read(receive, max_bytes, int(declared), memory, timer, until, limits)
        if coding and body:
            await memory.grow(min(max_bytes, len(body) * _MOST_EXPANDED))
            body = await decompress(body, coding, max_bytes)
        if memory.bytes:
            memory.received(len(body))
        return body
    except TooLarge:
        raise _too_large(max_bytes) from None
    except TimeoutError:
        raise (no_memory() if memory.evicted else _too_slow()) from None


async def _read(
    receive: Receive,
    max_bytes: int,
    declared: int,
    memory: BodyReservation,
    timer: asyncio.Timeout,
    until: float,
    limits: Limits,
) -> bytes:
    """Return the body. ``timer`` expires ``until`` then, or when the client is too slow.

    Raises `ClientDisconnected` and `TooLarge`.
    """
    loop = asyncio.get_running_loop()
    timer.reschedule(min(until, loop.time() + limits.stall_s))
    body: bytes | bytearray = b""
    timed = 0
    while True:
        chunk, complete = await receive_chunk(receive)
        if len(body) + len(chunk) > max_bytes:
            raise TooLarge
        if complete and not body:
            body = chunk
        else:
            # NOTE: no list of chunks, since each object takes more memory than the smallest chunk.
            body = bytearray(body) if isinstance(body, bytes) else body
            body += chunk
        if len(body) > FREE_BYTES:
            await memory.grow(max(declared, len(body)), timer)
        if complete:
            return bytes(body)
        if len(body) - timed >= limits.bytes_per_stall:
            timed = len(body)
            timer.reschedule(min(until, loop.time() + limits.stall_s))


def _too_large(max_bytes: int) -> ApiError:
    return bad_request(f"The body is larger than {max_bytes} bytes.", None, "body_too_large", 413)


def _too_slow() -> ApiError:
    return bad_request("The body did not arrive in time. Send it again.", None, "body_timeout", 408)


def too_deep() -> ApiError:
    """400: the parser accepts the body, but the encoder does not support its nesting depth."""
    return bad_request("The body nests too deeply.", None, "invalid_json")


def parse_json(body: bytes) -> Any:
    """Return the parsed body. Raises `ApiError` 400 if it is not JSON."""
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        # NOTE: the decoder's message contains a position, but no text of the body.
        raise bad_request(
            f"The body is not JSON: {error.msg} at character {error.pos}.", None, "invalid_json"
        ) from None


def parse_document(body: bytes) -> dict[str, Any]:
    """Return the body as a JSON object. Raises `ApiError` 400 if it is not one."""
    document = parse_json(body)
    if not isinstance(document, dict):
        raise bad_request("The body must be a JSON object.", None, "invalid_json")
    return document


def check_with_engine(document: dict[str, Any], engine: Engine) -> None:
    """Raise `ApiError` 400 if ``engine`` cannot serve ``document`` safely. May drop a field that has no effect."""
    reason = engine.unsupported_reason(document)
    if reason is not None:
        raise bad_request(reason, reason.partition(":")[0], "unsupported_parameter")


def gate_xargs(kind: ServiceKind, pace_s: float | None, gate: str) -> dict[str, Any]:
    """Return what the step gate ``gate`` plans with, as members of ``vllm_xargs``; nothing for an empty ``gate``.

    ``pace_s``: seconds per output token, None without a pace.
    """
    if not gate:
        return {}
    xargs: dict[str, Any] = {GATE_XARG: gate}
    if pace_s is not None:
        xargs[TPOT_XARG] = round(pace_s * 1000, 3)
    if kind is not default_kind(pace_s):
        xargs[KIND_XARG] = kind.label
    return xargs


def document_for_engine(document: dict[str, Any], own_xargs: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return a copy of the client's document, with ``own_xargs`` (`gate_xargs`) among its ``vllm_xargs``.

    INVARIANT: members that start with `OWN_XARGS_PREFIX` never come from a client. They would let a request claim a
    pace that it was not admitted with.
    """
    clients_xargs = document.get("vllm_xargs")
    if not isinstance(clients_xargs, dict):
        clients_xargs, xargs = None, {}
    else:
        xargs = {key: value for key, value in clients_xargs.items() if not key.startswith(OWN_XARGS_PREFIX)}
    xargs.update(own_xargs or {})
    result = dict(document)
    if xargs:
        result["vllm_xargs"] = xargs
    elif clients_xargs is not None:
        del result["vllm_xargs"]
    return result


def engine_scope(scope: Scope, request_id: bytes, content_length: int | None = None) -> Scope:
    """Return the ASGI scope for a call to an engine's app. ``content_length``: None while the body is not encoded."""
    headers: Headers = [(k, v) for k, v in scope["headers"] if k.lower() not in _NOT_FORWARDED]
    headers.append((b"x-request-id", request_id))
    if content_length is not None:
        headers.append((b"content-length", str(content_length).encode()))
    # A new "state": the engine's app must not read or change the gateway's.
    return {**scope, "headers": headers, "state": {}}
