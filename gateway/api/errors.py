"""Error responses in the OpenAI API's shape."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import orjson

Headers = list[tuple[bytes, bytes]]

DRAINING_RETRY_S = 5.0
"""``Retry-After`` (s) of a gateway that shuts down: about the time that a replacement takes to start. Convention."""


@dataclass(slots=True)
class ApiError(Exception):
    """An error response. ``extra``: more members of the error object; ``headers``: more response headers."""

    status: int
    message: str
    type: str
    code: str | None
    param: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    headers: Headers = field(default_factory=list)

    def body(self) -> bytes:
        """Return the error as a JSON document."""
        error = {
            "message": self.message,
            "type": self.type,
            "param": self.param,
            "code": self.code,
            **self.extra,
        }
        return orjson.dumps({"error": error})

    def event(self) -> bytes:
        """Return the error as the last events of a stream that has started."""
        return b"data: " + self.body() + b"\n\ndata: [DONE]\n\n"


def bad_request(message: str, param: str | None, code: str = "invalid_value", status: int = 400) -> ApiError:
    """4xx: the message states what to fix; ``param`` names the header or field."""
    return ApiError(status, message, "invalid_request_error", code, param)


def not_found(message: str) -> ApiError:
    """404: the gateway has no such path."""
    return ApiError(404, message, "invalid_request_error", "not_found")


def method_not_allowed(method: str, path: str, allowed: str) -> ApiError:
    """405: ``allowed`` is the value of the ``Allow`` header."""
    message = f"{method} is not supported by {path}. Use {allowed}."
    headers = [(b"allow", allowed.encode())]
    return ApiError(405, message, "invalid_request_error", "method_not_allowed", headers=headers)


def retry_headers(retry_after_s: float, should_retry: bool = True) -> Headers:
    """Return ``Retry-After`` (whole seconds, at least 1) and ``x-should-retry``, which OpenAI's clients obey."""
    seconds = max(1, math.ceil(min(retry_after_s, 86_400)))
    return [
        (b"retry-after", str(seconds).encode()),
        (b"x-should-retry", b"true" if should_retry else b"false"),
    ]


def unavailable(message: str, code: str, retry_after_s: float) -> ApiError:
    """503: no engine can serve the request, or the gateway drains."""
    return ApiError(503, message, "service_unavailable", code, headers=retry_headers(retry_after_s))


def draining() -> ApiError:
    """503: the gateway shuts down, and serves neither this request nor any later one."""
    return unavailable("The gateway is shutting down.", "draining", DRAINING_RETRY_S)


def engine_removed() -> ApiError:
    """503: the engine that served the request is no longer configured, and its time to finish is over."""
    return unavailable("The engine that served this request was removed. Send it again.", "draining", 1.0)


def loading(retry_after_s: float) -> ApiError:
    """503: the gateway has started, but no engine yet."""
    return unavailable("The engines are starting.", "engine_unavailable", retry_after_s)
