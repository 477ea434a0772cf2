"""Keep-alive comments for the client of a stream whose first token takes long.

Proxies and clients close connections that are silent for too long. So after some time without an answer, the gateway
opens the stream itself and sends comments, which clients ignore, until the answer begins. The status of the response
is then 200 whatever the answer is: any answer that is not a stream, such as a 429, becomes an error event.
"""

from __future__ import annotations

import asyncio
import contextlib
from types import TracebackType
from typing import Self

import orjson

from engine_adapter.engine import Message
from gateway.api.errors import ApiError
from gateway.api.http_request import STREAM_HEADERS, HttpRequest

COMMENT = b": keep-alive\n\n"

_STREAM_TYPE = b"text/event-stream"
_MAX_ANSWER_BYTES = 1 << 20
"""Limit on an answer that is held back to become one event. An error is far smaller."""


class KeepAlive:
    """Sends comments to the client of ``http`` every ``interval_s`` seconds, from entry until the answer begins.

    It takes the place of the client's ``send``, and gives that back as soon as a stream passes through unchanged. So
    it costs nothing per event.
    """

    def __init__(self, http: HttpRequest, interval_s: float) -> None:
        self._http = http
        self._send = http.client_send
        self._interval_s = interval_s
        self._opened = self._answering = False
        self._timer: asyncio.TimerHandle | None = None
        self._writing: asyncio.Task[None] | None = None
        self._answer = bytearray()

    def __enter__(self) -> Self:
        self._http.client_send = self.send
        self._arm()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop_timer()

    async def send(self, message: Message) -> None:
        """Send one message of the answer."""
        self._stop_timer()
        if self._writing is not None:
            await asyncio.wait({self._writing})
        if not self._opened:
            self._http.client_send = self._send
            await self._send(message)
        elif message["type"] == "http.response.start":
            if _is_stream(message):
                self._http.client_send = self._send
        else:
            await self._collect(message)

    async def _collect(self, message: Message) -> None:
        """Collect the body of an answer that is not a stream, and send it as the last events."""
        body = message.get("body", b"")
        if len(self._answer) + len(body) > _MAX_ANSWER_BYTES:
            too_long = ApiError(502, "The engine's answer is not a stream.", "engine_error", "engine_error")
            self._answer[:] = too_long.body()
        else:
            self._answer += body
        if not message.get("more_body"):
            events = self._http.route.errors.last_events(_as_object(self._answer), 0)
            await self._send({"type": "http.response.body", "body": events})

    def _arm(self) -> None:
        if not self._answering:
            self._timer = asyncio.get_running_loop().call_later(self._interval_s, self._due)

    def _stop_timer(self) -> None:
        self._answering = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _due(self) -> None:
        self._writing = asyncio.create_task(self._write(), name="keep alive")

    async def _write(self) -> None:
        # A server may raise if the client has gone. The request then ends by itself.
        with contextlib.suppress(OSError):
            if not self._opened:
                self._opened = True
                headers = [(b"content-type", _STREAM_TYPE + b"; charset=utf-8"), *STREAM_HEADERS]
                headers.append((b"x-request-id", self._http.request_id))
                await self._send({"type": "http.response.start", "status": 200, "headers": headers})
            await self._send({"type": "http.response.body", "body": COMMENT, "more_body": True})
            self._arm()


def _as_object(answer: bytes | bytearray) -> bytes:
    """Return the answer as a JSON object in one line; an error object if it is something else, such as an HTML page."""
    with contextlib.suppress(orjson.JSONDecodeError, orjson.JSONEncodeError):
        document = orjson.loads(answer)
        if isinstance(document, dict):
            return orjson.dumps(document)
    return ApiError(502, "The engine's answer is neither a stream nor JSON.", "engine_error", "engine_error").body()


def _is_stream(start: Message) -> bool:
    content_type = next((v for k, v in start.get("headers", ()) if k.lower() == b"content-type"), b"")
    return bool(start["status"] == 200 and content_type.startswith(_STREAM_TYPE))
