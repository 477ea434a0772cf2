"""The response of one admitted request on its way from the engine to the client.

This is the gateway's hot path: `ResponseRelay.pass_event` or `ResponseRelay.send` runs once for every event of every
stream. Bytes pass through unparsed. After the first token, an event costs a few comparisons.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable

from engine_adapter.engine import FAILED_KEY, Message, Send
from gateway.api.errors import ApiError, Headers
from gateway.api.failover import HeldResponse
from gateway.api.http_request import is_event_stream
from gateway.api.routes import error_shape
from gateway.api.routes.error_shape import ErrorShape
from gateway.api.routes.generation import GenerationRoute
from gateway.api.routes.stream_format import may_hold_several_events
from gateway.api.slo_report import first_byte_headers, sse_comment, with_slo_report
from gateway.observability.ledger import Entry, Outcome
from gateway.requests.progress import Progress, tpot

LAST_WORDS_S = 5.0
"""Time limit in seconds for sending the end of a response that the engine did not end. Convention."""


class ResponseRelay:
    """Wraps the client's ``send`` for one call to an engine's app.

    ``status`` is the response's status, 0 before it starts. ``failed_in_stream``: the engine reported an error inside a
    stream that started with 200. ``refused_in_stream``: it was the first event, and the client's fault. ``complete``:
    the client was sent the whole response. A stream is complete at its last event, where many clients disconnect,
    although the engine's app may take longer to end it.

    ``event_writer``: returns what writes an event of the stream to the client at once (`HttpRequest.event_writer`).

    ``held``: holds an error response, also an error event at the start of a stream, until it is known whether another
    engine serves the request. If none does, `release` sends it.
    """

    def __init__(
        self,
        entry: Entry,
        progress: Progress,
        send: Send,
        request_id: bytes,
        route: GenerationRoute,
        *,
        report: bool,
        held: HeldResponse,
        event_writer: Callable[[], Callable[[bytes], bool] | None],
    ) -> None:
        self.status = 0
        self.failed_in_stream = self.refused_in_stream = False
        self.complete = False
        self.held = held
        self._entry = entry
        self._progress = progress
        self._send = send
        self._request_id = request_id
        self._errors = route.errors
        self._format = route.stream
        self._report = report
        self._pending_start: Message | None = None
        self._started = self._ended = False
        self._streaming = False
        self._buffered: list[bytes] = []
        self._writes_begun = self._writes_done = 0
        self._first_token_sent_s: float | None = None
        self._last_token_sent_s = 0.0
        self._event_writer = event_writer
        self._write_event: Callable[[bytes], bool] | None = None

    def pass_event(self, event: bytes, at: float) -> bool:
        """Send an event at once, if that takes no more than writing it (`engine_adapter.engine.PassEvent`)."""
        if self._first_token_sent_s is None or self._writes_begun > self._writes_done:
            return False
        if self._write_event is None:
            self._write_event = self._event_writer() or _refuse
        if not self._write_event(event):
            return False
        self._writes_begun = self._writes_done = self._writes_begun + 1
        self._last_token_sent_s = at
        return True

    def send(self, message: Message) -> Awaitable[None]:
        """Relay one message of the engine's app. This is the ``send`` that the app is called with."""
        if message["type"] != "http.response.body":
            return self._begin(message)
        # NOTE: a coroutine less for each event to pass through.
        return self._send_event(message) if self._streaming else self._send_document(message)

    async def _begin(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            # Delayed until the first body bytes, when the measured TTFT is known and can go into a header.
            self._pending_start = message
            self.status = message["status"]
            self._streaming = is_event_stream(message.get("headers", ()))
            if self.held.begin(message):
                self._streaming = False

    async def _send_event(self, message: Message) -> None:
        body: bytes = message.get("body", b"")
        if self._pending_start is not None:
            if not body and message.get("more_body"):
                return
            has_error = self._format.has_error(body, may_hold_several_events(body))
            self.refused_in_stream = has_error and self._format.refuses(body)
            if has_error and not self.refused_in_stream and self.held.begin(self._pending_start, in_stream=True):
                self.held.add(message)
                self._streaming = False
                return
            self._writes_begun += 1
            # A server may open the stream before its first token. Then no TTFT is known yet.
            has_token = bool(body) and self._progress.request.generated > 0
            await self._send_start(time.monotonic() - self._entry.request.arrival_s if has_token else None)
        end = -1
        if not self._format.is_usual(body):
            several = may_hold_several_events(body)
            self.failed_in_stream |= self._format.has_error(body, several)
            end = self._format.end_in(body, several)
        if end >= 0 and self._report and not self.failed_in_stream:
            self.measure(time.monotonic())
            message = {**message, "body": body[:end] + sse_comment(self._entry) + body[end:]}
        self._writes_begun += 1
        await self._send(message)
        self._writes_done = self._writes_begun
        if body:
            self._note_event(body, end)
        if not message.get("more_body"):
            self.complete = self._ended = True

    def _note_event(self, body: bytes, end: int) -> None:
        """Stamp the first and the last token, and note the end of the stream, which starts at ``end`` of ``body``."""
        now = time.monotonic()
        if self._first_token_sent_s is None and self._progress.request.generated and not self._format.opens(body):
            self._first_token_sent_s = now
        if end != 0:
            self._last_token_sent_s = now
        # The last event may be long and arrive in parts.
        if end >= 0 and body.endswith(b"\n"):
            self.complete = True

    async def _send_document(self, message: Message) -> None:
        if self.held.active:
            self.held.add(message)
            return
        last = not message.get("more_body")
        self.failed_in_stream |= FAILED_KEY in message
        if self._report and self.status == 200:
            self._buffered.append(message.get("body", b""))
            if not last:
                return
            self.measure(time.monotonic())
            message = {"type": "http.response.body", "body": with_slo_report(b"".join(self._buffered), self._entry)}
        self._writes_begun += 1
        if self._pending_start is not None:
            first = self._progress.request.first_token_s
            content_length = len(message.get("body", b"")) if last else None
            await self._send_start(None if first is None else first - self._entry.request.arrival_s, content_length)
        await self._send(message)
        self._writes_done = self._writes_begun
        if last:
            self.complete = self._ended = True

    async def _send_start(self, ttft_s: float | None, content_length: int | None = None) -> None:
        assert self._pending_start is not None
        headers: Headers = list(self._pending_start.get("headers", ()))
        if content_length is not None:
            headers = [header for header in headers if header[0].lower() != b"content-length"]
            headers.append((b"content-length", b"%d" % content_length))
        headers += first_byte_headers(self._entry, ttft_s)
        start, self._pending_start = {**self._pending_start, "headers": headers}, None
        self._started = True
        await self._send(start)

    @property
    def started(self) -> bool:
        """Whether the client was sent any part of the response."""
        return self._started

    async def release(self) -> None:
        """Send the client the response that was held."""
        messages, self._streaming = self.held.release(), self.held.in_stream
        if isinstance(messages, ApiError):
            await self.fail(messages)
            return
        for message in messages:
            await self.send(message)

    @property
    def is_blocked(self) -> bool:
        """Whether a write waits because the client does not read."""
        return self._writes_begun > self._writes_done

    @property
    def outcome(self) -> tuple[Outcome, str]:
        """Outcome and reason of a complete response, for the ledger."""
        if self.refused_in_stream:
            return "rejected", "engine_refused"
        if self.failed_in_stream or self.status >= 500:
            return "failed", "engine_error"
        if self.status >= 400:
            return "rejected", "engine_busy" if self.status == 429 else "engine_refused"
        return "finished", ""

    async def end(self) -> None:
        """End a complete stream that the engine's app did not end."""
        if not self._ended:
            self._ended = True
            async with _final_write():
                await self._send({"type": "http.response.body", "body": b""})

    async def fail(self, error: ApiError) -> None:
        """Answer with ``error``, or end a stream that has started with an error event."""
        if self.complete:
            return
        async with _final_write():
            if not self._started:
                self.status = error.status
                await send_error(self._send, error, self._request_id, self._errors)
            elif self._streaming:
                event = self._errors.event(error, self._request_id, self._writes_begun - 1)
                await self._send({"type": "http.response.body", "body": event})
        # A partial JSON document cannot be repaired. The client notices, because content-length does not match.
        self.complete = self._ended = True

    def measure(self, now: float) -> None:
        """Write the measured TTFT, TPOT and e2e latency (s) into the ledger entry. ``now``: monotonic seconds."""
        entry, progress = self._entry, self._progress
        request = entry.request
        if self._streaming and self._first_token_sent_s is not None:
            entry.ttft_s = self._first_token_sent_s - request.arrival_s
            if request.sequences == 1:
                entry.tpot_s = tpot(self._first_token_sent_s, self._last_token_sent_s, request.generated)
            else:
                entry.tpot_s = progress.tpot_s
            entry.e2e_s = self._last_token_sent_s - request.arrival_s
            return
        # Without streaming, no token reaches the client early. Tokens count when they leave the engine.
        if request.first_token_s is not None:
            entry.ttft_s = request.first_token_s - request.arrival_s
        entry.tpot_s = progress.tpot_s
        entry.e2e_s = now - request.arrival_s


def _refuse(event: bytes) -> bool:
    """In place of a writer where there is none."""
    return False


@contextlib.asynccontextmanager
async def _final_write() -> AsyncIterator[None]:
    """Bound the time of a last write: a client that stopped reading must not keep its slot."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LAST_WORDS_S):
            yield


async def send_error(
    send: Send, error: ApiError, request_id: bytes = b"", shape: ErrorShape = error_shape.OPENAI
) -> None:
    """Send ``error`` as a whole response, in the API's ``shape``."""
    body = shape.body(error, request_id)
    headers: Headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": error.status, "headers": headers + error.headers})
    await send({"type": "http.response.body", "body": body})
