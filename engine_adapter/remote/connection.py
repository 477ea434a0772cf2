"""One HTTP/1.1 connection to a server: writes requests and parses the responses with httptools."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Protocol, cast

import httptools

from engine_adapter.remote.request import Headers

_MAX_HEAD_BYTES = 1 << 17
"""Largest accepted head of a response, in bytes."""


class Receiver(Protocol):
    """What a connection reports a response to."""

    status: int
    headers: Headers
    read_at: float
    complete: bool

    def on_head(self, status: int) -> bool:
        """Take the status; the headers are complete. Returns whether a body follows."""

    def on_body(self, data: bytes) -> None:
        """Take bytes of the body."""

    def on_complete(self) -> None:
        """Note that the body is complete."""

    def on_lost(self, reason: str) -> None:
        """Note that the connection broke."""


class Connection(asyncio.Protocol):
    """One connection to the server: parses the responses, one at a time.

    Args:
        on_reusable: called when a response is complete and the connection can take another request.

    INVARIANT: ``usable`` is False once the bytes that follow are unknown, so that no response gets another one's bytes.
    """

    def __init__(self, on_reusable: Callable[[Connection], None]) -> None:
        self.usable = False
        self.idle_since = 0.0
        self._on_reusable = on_reusable
        self._transport: asyncio.Transport | None = None
        # NOTE: without a call of Python for each part, because a server sends every event as a chunk of its own.
        self._parts: list[bytes] = []
        self.on_body = self._parts.append
        self._parser = httptools.HttpResponseParser(self)
        # As lenient as browsers and other clients, which real servers are tested with.
        self._parser.set_dangerous_leniencies(
            lenient_headers=True, lenient_optional_cr_before_lf=True, lenient_spaces_after_chunk_size=True
        )
        self._response: Receiver | None = None
        self._finishing: asyncio.TimerHandle | None = None
        self._head_bytes = 0
        self._interim = False
        self._reusable = self._ends_with_connection = False
        self._headers: Headers = []

    # --- used by `Upstream` and `Response` ---

    def send(self, response: Receiver, request: bytes) -> None:
        """Write a request whose answer is ``response``."""
        assert self._transport is not None
        self.usable = False
        self._response = response
        self._head_bytes = 0
        self._headers = []
        self._reusable = self._ends_with_connection = False
        self._transport.write(request)

    def finish(self, complete: bool, wait_s: float = 0.0) -> None:
        """Detach the response. Keep the connection for another request if it is complete, now or within ``wait_s``."""
        self._response = None if complete else self._response
        if complete and self._reusable:
            self._release()
        elif not complete and wait_s and self._transport is not None and not self._transport.is_closing():
            self.resume()
            self._finishing = asyncio.get_running_loop().call_later(wait_s, self.abort)
        else:
            self.abort()

    def abort(self) -> None:
        """Close the connection at once. Idempotent."""
        self.usable = False
        if self._transport is not None:
            self._transport.abort()

    def pause(self) -> None:
        """Let the server wait."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.pause_reading()

    def resume(self) -> None:
        """Read on."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()

    def _release(self) -> None:
        self._response = None
        self.usable = True
        self._on_reusable(self)

    # --- called by the event loop ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take the transport."""
        self._transport = cast(asyncio.Transport, transport)
        self.usable = True

    def data_received(self, data: bytes) -> None:
        """Parse bytes of the response."""
        response = self._response
        if response is None:
            # Bytes that belong to no request, such as a 408 for an idle connection.
            self.abort()
            return
        response.read_at = time.monotonic()
        if not response.status:
            self._head_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._pass_body()
            # NOTE: its text may quote the response.
            self._broken(f"{type(error).__name__}: the server broke the protocol")
            return
        if self._parts:
            self._pass_body()
        if self._head_bytes > _MAX_HEAD_BYTES and not response.status:
            self._broken("ProtocolError: the head of the response is too large")

    def connection_lost(self, error: Exception | None) -> None:
        """End the response."""
        self.usable = False
        if self._finishing is not None:
            self._finishing.cancel()
            self._finishing = None
        # The parser refers to this object. Without it, reference counting frees both.
        self._parser = self._transport = None  # type: ignore[assignment]
        response, self._response = self._response, None
        if response is None:
            return
        if self._ends_with_connection and error is None:
            response.on_complete()
            return
        name = "ConnectionError" if error is None else type(error).__name__
        response.on_lost(f"{name}: the connection closed before the response was complete")

    def _broken(self, reason: str) -> None:
        self.usable = self._ends_with_connection = False
        response, self._response = self._response, None
        self.abort()
        if response is not None:
            response.on_lost(reason)

    # --- called by the parser ---

    def on_message_begin(self) -> None:
        """Close the connection if the server sends a second response."""
        if self._response is None or self._response.complete:
            self._reusable = False
            self.abort()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take one header. A trailer after the body is dropped."""
        response = self._response
        if response is not None and not response.status:
            self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        """Take the head, unless it belongs to an interim response."""
        response = self._response
        if response is None or response.status:
            return
        status = self._parser.get_status_code()
        self._interim = 100 <= status < 200
        if self._interim:
            self._headers = []
            return
        names = dict(self._headers)
        self._reusable = self._parser.should_keep_alive()
        has_length = b"content-length" in names or b"transfer-encoding" in names
        self._ends_with_connection = not has_length
        response.headers = self._headers
        if not response.on_head(status):
            # The parser waits for a body that a HEAD request does not get.
            self._reusable = False

    def _pass_body(self) -> None:
        """Pass the parts of the body that were parsed to the response. What follows its end is dropped."""
        response, body = self._response, b"".join(self._parts)  # NOTE: a single part is not copied.
        self._parts.clear()
        if response is not None and not response.complete and body:
            response.on_body(body)

    def on_message_complete(self) -> None:
        """Note that the response is complete."""
        if self._interim:
            self._interim = False
            return
        self._pass_body()
        response = self._response
        if response is None or response.complete:
            return
        response.on_complete()
        if self._finishing is not None:
            self._finishing.cancel()
            self._finishing = None
            if self._reusable:
                self._release()
            else:
                self.abort()
