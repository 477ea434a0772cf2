"""Compressed request bodies: decompress gzip and deflate within the size limit of a body."""

from __future__ import annotations

import asyncio
import zlib

from starlette.datastructures import Headers as HeaderView

from gateway.api.errors import ApiError, bad_request

SUPPORTED = "gzip, deflate"
"""Value of ``Accept-Encoding`` in the response to another encoding."""

_GZIP_OR_ZLIB, _RAW_DEFLATE = zlib.MAX_WBITS | 32, -zlib.MAX_WBITS
_CODINGS = frozenset(("gzip", "x-gzip", "deflate"))

_MAX_MEMBERS = 16
"""Limit on the members of a gzip body. Each one copies the rest of the body. Convention; clients send one."""


class TooLarge(Exception):  # noqa: N818 - it names an event, not an error
    """The body, as received or decompressed, is larger than the limit."""


def content_coding(headers: HeaderView) -> str:
    """Return the coding of a request's body, or "" without one. Raises `ApiError` 415 for an unsupported coding."""
    if "content-encoding" not in headers:
        return ""
    listed = ",".join(headers.getlist("content-encoding")).lower()
    codings = [coding for part in listed.split(",") if (coding := part.strip()) not in ("", "identity")]
    if not codings:
        return ""
    if len(codings) == 1 and codings[0] in _CODINGS:
        return codings[0]
    error = bad_request(
        f"content-encoding: {', '.join(codings)[:64]!r} is not supported. Send the body with one of {SUPPORTED}, "
        "or uncompressed.",
        "content-encoding",
        "unsupported_encoding",
        415,
    )
    error.headers.append((b"accept-encoding", SUPPORTED.encode()))
    raise error


async def decompress(body: bytes, coding: str, max_bytes: int) -> bytes:
    """Return ``body`` without its ``coding``, in another thread: a small body may expand to ``max_bytes``.

    Raises `TooLarge` as soon as the output exceeds ``max_bytes``, and `ApiError` 400 if the data is invalid.
    """
    try:
        return await asyncio.to_thread(_inflate, body, coding == "deflate", max_bytes)
    except (zlib.error, EOFError):
        raise _invalid(coding) from None


def _inflate(body: bytes, may_be_raw: bool, max_bytes: int) -> bytes:
    """Return the decompressed members of ``body``. Raises `TooLarge`, and `zlib.error` or `EOFError` for bad data."""
    window = _GZIP_OR_ZLIB
    # "deflate" means the zlib format, but some clients send raw deflate data, which has no header.
    if may_be_raw and not _is_zlib(body):
        window = _RAW_DEFLATE
    output: list[bytes] = []
    size, rest = 0, body
    while rest:
        if len(output) == _MAX_MEMBERS:
            raise EOFError
        member = zlib.decompressobj(window)
        output.append(member.decompress(rest, max_bytes - size + 1))
        size += len(output[-1])
        if size > max_bytes:
            raise TooLarge
        if not member.eof:
            raise EOFError
        rest = member.unused_data
    return b"".join(output)


def _is_zlib(body: bytes) -> bool:
    """Whether ``body`` starts with a zlib header (RFC 1950)."""
    return len(body) >= 2 and body[0] & 0x0F == 8 and int.from_bytes(body[:2]) % 31 == 0


def _invalid(coding: str) -> ApiError:
    message = f"content-encoding: the body is not valid {coding} data, or it is truncated."
    return bad_request(message, "content-encoding", "invalid_encoding")
