"""One connection of a client: how long it lives, how slowly its client may read, and the responses on it.

Time limits have no timers: `gateway.api.connections.Connections` asks each connection twice a second whether it exceeds
one (`HttpConnection.overdue`).

A response waits for its client in the write buffer of the connection, up to ``limits.response_buffer_bytes``. So an
engine's app is done when the engine is, however slowly the client reads.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from gateway.api.backlog import Backlog
from gateway.api.connections import Connections, client_address
from gateway.api.errors import ApiError, bad_request
from gateway.api.head_buffer import HeadBuffer
from gateway.api.paths import API_PREFIX
from gateway.api.shared_limit import ONLY_SHARER
from gateway.api.start_queue import ARRIVED_KEY

if TYPE_CHECKING:
    from uvicorn._types import ASGI3Application

LINGER_S = 2.0
"""Seconds in which a client may read an error before its connection is closed. What it sends meanwhile is dropped.

Closing at once would reset the connection of a client that still sends, and it might never read the error."""

_LOW_WATER = 64 << 10
"""Bytes below the limit of a response's buffer at which its engine may continue."""


class HttpConnection(HttpToolsProtocol):
    """One connection of a client. A subclass reads what the client sends.

    Attributes:
        address: what counts as one client.
        is_shared: whether many clients may have that address.
        sharer: the tenant of the last request.
        cut_reason: why the gateway closed the connection; "" if it did not.
    """

    def __init__(self, connections: Connections | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.address = ""
        self.is_shared = True
        self.sharer = ONLY_SHARER
        self.cut_reason = ""
        self._watch = Connections() if connections is None else connections
        self._limits = self._watch.limits
        self._since = self._head_since = 0.0
        # Bytes received since the last complete head, and of the body that is being received.
        self._head_bytes = self._body_bytes = self._overhead = 0
        self._in_head = self._in_body = False
        self._closing = self._gives_up = False
        self._error: ApiError | None = None
        self._serving: RequestResponseCycle | None = None
        self._backlog: Backlog | None = None
        self._is_lost = False
        self._disconnected: asyncio.Future[None] | None = None

    # --- the connection -----------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Count the connection, or refuse it."""
        super().connection_made(transport)
        high = self._limits.response_buffer_bytes
        transport.set_write_buffer_limits(high=high, low=max(high - _LOW_WATER, high // 2))
        self.address = client_address(self.client[0] if self.client else None)
        self.is_shared = self._watch.is_shared(self.address)
        self._since, self._backlog = self.loop.time(), Backlog(transport)
        error = self._watch.add(self)
        if error is not None:
            self._closing = True
            self._write(error)
            transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell the app that the client disconnected."""
        self._watch.remove(self)
        self._is_lost = True
        self._end_request()
        cycle = self._serving
        self._watch.starts.withdraw(cycle)
        if cycle is not None and cycle is not self.cycle and not cycle.response_complete:
            # uvicorn tells only the last one of several requests.
            cycle.disconnected = True
            cycle.message_event.set()
        self.pipeline.clear()
        super().connection_lost(exc)
        self._backlog = None
        # Break the cycles with the parser, the scope and the request: else only a full garbage collection frees them.
        self.parser = self.scope = self.cycle = self._serving = None  # type: ignore[assignment]

    def disconnected(self) -> asyncio.Future[None]:
        """Return a future for the request that is served: it is done when its client is gone or has its response."""
        if self._disconnected is None:
            self._disconnected = self.loop.create_future()
            if self._is_lost:
                self._end_request()
        return self._disconnected

    def _end_request(self) -> None:
        if self._disconnected is not None and not self._disconnected.done():
            self._disconnected.set_result(None)

    def cut(self, reason: str) -> None:
        """Close the connection because of ``reason``."""
        if self.transport.is_closing() and not self.buffered:
            return
        if not self.cut_reason:
            self.cut_reason = reason
            self._watch.closed(reason)
        if reason == "head_timeout":
            self._answer(bad_request("The request head did not arrive in time.", None, reason, 408))
            return
        self._closing = True
        if self.is_idle:
            self.transport.close()
        else:
            self.transport.abort()

    def event_writer(self, send: object) -> Callable[[bytes], bool] | None:
        """Return what writes an event of the stream that is being served, at less cost than its ASGI ``send``.

        It returns False, and writes nothing, if the client reads slowly or the stream cannot go on. None if ``send`` is
        not this server's own: something between here and the app may change what is sent.
        """
        cycle, flow = self._serving, self.flow
        is_own: bool = getattr(send, "__self__", None) is cycle
        if cycle is None or not is_own or not cycle.chunked_encoding:
            return None
        cycle.transport.flush()  # type: ignore[attr-defined]
        write_chunk = self.transport.write

        def write(event: bytes) -> bool:
            if flow.write_paused or cycle.disconnected or cycle.response_complete or self._closing:
                return False
            write_chunk(b"%x\r\n%b\r\n" % (len(event), event))
            return True

        return write

    def give_up_body(self) -> None:
        """Close the connection after the response if the rest of the request's body has not arrived by then."""
        self._gives_up = True

    def arrived_body(self, most: int) -> bytes | None:
        """Return the body of the request that is served, once. None if it is incomplete or above ``most`` bytes.

        A small request needs no timer for its body then.
        """
        cycle = self._serving
        if cycle is None or cycle.more_body or cycle.disconnected or len(cycle.body) > most:
            return None
        body, cycle.body = bytes(cycle.body), bytearray()
        cycle.message_event.clear()
        return body

    @property
    def is_idle(self) -> bool:
        """Whether no request is in flight, and nothing waits for the client."""
        return not self._is_answering and not self._in_body and not self.buffered

    @property
    def buffered(self) -> int:
        """Bytes that wait for the client."""
        return self.transport.get_write_buffer_size()

    @property
    def behind_since(self) -> float:
        """When the client was first seen with the data that waits for it (monotonic s); 0 if none waits."""
        return 0.0 if self._backlog is None else self._backlog.since

    @property
    def _is_answering(self) -> bool:
        return self._serving is not None and not self._serving.response_complete

    def overdue(self, now: float) -> str:
        """Return the time limit that the client exceeds at ``now``; "" if none."""
        if self._backlog is not None and self._backlog.is_stalled(now, self._limits):
            return "slow_reader"
        if self.buffered or self._is_answering:
            # The reader of its body limits its time.
            return ""
        reason, limit_s = self._time_limit()
        return reason if now > max(self._since, self._head_since) + limit_s else ""

    def _time_limit(self) -> tuple[str, float]:
        """Return the time limit of a client that no response is due to: its name and its seconds."""
        limits = self._limits
        if self._closing:
            return "linger", LINGER_S
        if self._in_body:
            return "slow_body", limits.stall_s
        if self._in_head:
            return "head_timeout", limits.head_timeout_s
        return ("silent", limits.head_timeout_s) if self._serving is None else ("idle", limits.idle_timeout_s)

    # --- responses ----------------------------------------------------------------------------------------------------

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        """Serve the request, in its turn."""
        self._serving = cycle
        if not cycle.scope["path"].startswith(API_PREFIX) or self._watch.starts.take_turn():
            super()._start_asgi_task(cycle, app)
            return
        cycle.scope[ARRIVED_KEY] = time.monotonic()  # type: ignore[literal-required]
        # No memory is reserved for its body before it starts.
        self.flow.pause_reading()
        self._watch.starts.wait(cycle, lambda: self._start_now(cycle, app))

    def _start_now(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        # A client that left is noticed only while the connection is read.
        self.flow.resume_reading()
        super()._start_asgi_task(cycle, app)

    def on_response_complete(self) -> None:
        """Serve the next request that waits on the connection."""
        self.server_state.total_requests += 1
        self._end_request()
        self._disconnected = None
        self._since = self.loop.time()
        if self._serving is not None:
            # Of a response without a body.
            self._serving.transport.flush()  # type: ignore[attr-defined]
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self._in_body and self._gives_up:
            self._closing = True
            self._end_output()
        elif self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())

    def _refuse(self, error: ApiError) -> None:
        """Answer with ``error`` and close the connection, after the requests before it."""
        self._watch.closed(error.code or "")
        self.cut_reason = error.code or ""
        cycle = self._serving
        if cycle is None or cycle.response_complete:
            self._answer(error)
        elif cycle is not self.cycle or not self._in_body:
            # Another request is being answered. No later one follows.
            self._closing = True
            self.cycle.keep_alive = False
        elif cycle.response_started:
            self._closing = True
            self.transport.abort()
        else:
            # The app waits for the rest of this request, or has not started.
            self._watch.starts.withdraw(cycle)
            cycle.disconnected = True
            cycle.message_event.set()
            self._serving, self._in_body = None, False
            self._answer(error)

    def _answer(self, error: ApiError) -> None:
        """Send ``error``, and let the client read it before the connection is closed."""
        self._closing = True
        self._since = self.loop.time()
        self.flow.resume_reading()
        self._write(error)
        self._end_output()

    def _end_output(self) -> None:
        held = self.cycle.transport if self.cycle is not None else None
        if isinstance(held, HeadBuffer):
            held.flush()
        if self.transport.can_write_eof():
            self.transport.write_eof()

    def _write(self, error: ApiError) -> None:
        body = error.body()
        headers = [*self.server_state.default_headers, (b"content-type", b"application/json"), *error.headers]
        headers += [(b"content-length", b"%d" % len(body)), (b"connection", b"close")]
        lines = b"".join(b"%b: %b\r\n" % header for header in headers)
        self.transport.write(STATUS_LINE[error.status] + lines + b"\r\n" + body)
