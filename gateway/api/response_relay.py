"""One admitted request's exchange with its engine: bytes pass through, times are stamped on the way.

The hot path of the gateway: `ResponseRelay.send` runs once for every event of every stream. It parses nothing, copies
nothing, and after the first token does a few comparisons and a clock read.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable

from engine_adapter.engine import Message, Receive, Send
from gateway.api.errors import ApiError, Headers
from gateway.api.slo_report import first_byte_headers, sse_comment, with_slo_report
from gateway.observability.ledger import Entry
from gateway.requests.progress import Progress, tpot

_DONE = b"data: [DONE]"
_STREAM_ERROR = b'data: {"error"'
# Generated text may hold these words, but never after a bare newline: JSON escapes it.
_LATER_DONE, _LATER_ERROR = b"\n" + _DONE, b"\n" + _STREAM_ERROR
_LAST_DONE = (_LATER_DONE + b"\n\n", _LATER_DONE + b"\r\n\r\n")
_OWN_HEADERS = frozenset((b"x-request-id", b"content-length"))


LAST_WORDS_S = 5.0
"""Seconds that a client has to take the end of an answer that its engine did not end."""


class ResponseRelay:
    """Wraps the client's ``send`` for one call to an engine's app.

    ``status`` is the response's (0 before it started), ``failed_in_stream`` whether the engine reported an error inside
    a stream that had begun with 200, ``complete`` whether the client was sent all of the answer: of a stream that is up
    to its [DONE], at which many a client hangs up, however long the engine's side still takes to end it.
    """

    def __init__(
        self,
        entry: Entry,
        progress: Progress,
        send: Send,
        request_id: bytes,
        *,
        report: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.status = 0
        self.failed_in_stream = False
        self.complete = False
        self._entry = entry
        self._progress = progress
        self._send = send
        self._request_id = request_id
        self._report = report
        self._clock = clock
        self._start: Message | None = None
        self._started = self._ended = False
        self._streaming = False
        self._held: list[bytes] = []
        self._begun = self._begun_then = self._written = 0
        self._first_sent: float | None = None
        self._last_sent = 0.0

    async def send(self, message: Message) -> None:
        """The ``send`` that the engine's app is given."""
        if message["type"] != "http.response.body":
            if message["type"] == "http.response.start":
                # Held back until the first byte: by then it is known how long the first token took.
                self._start = message
                self.status = message["status"]
                self._streaming = _content_type(message).startswith(b"text/event-stream")
            return
        if self._streaming:
            await self._send_event(message)
        else:
            await self._send_document(message)

    async def _send_event(self, message: Message) -> None:
        body: bytes = message.get("body", b"")
        if self._start is not None:
            if not body and message.get("more_body"):
                return
            self._begun += 1
            # A server may open the stream before it has a token; then there is nothing to tell yet.
            known = bool(body) and self._progress.request.generated > 0
            await self._send_start(self._clock() - self._entry.request.arrival_s if known else None)
        if body.startswith(_STREAM_ERROR) or _LATER_ERROR in body:
            self.failed_in_stream = True
        if self._report and not self.failed_in_stream and (body.startswith(_DONE) or _LATER_DONE in body):
            self.measure(self._clock())
            before, done, after = body.rpartition(_DONE)
            message = {**message, "body": before + sse_comment(self._entry) + done + after}
        self._begun += 1
        await self._send(message)
        self._written = self._begun
        if body:
            now = self._clock()
            # The role chunk opens a stream; it is not a token.
            if self._first_sent is None and self._progress.request.generated and not _is_role_chunk(body):
                self._first_sent = now
            if body.startswith(_DONE):
                self.complete = True
            else:
                self._last_sent = now
                if body.endswith(_LAST_DONE):
                    self.complete = True
        if not message.get("more_body"):
            self.complete = self._ended = True

    async def _send_document(self, message: Message) -> None:
        last = not message.get("more_body")
        if self._report and self.status == 200:
            self._held.append(message.get("body", b""))
            if not last:
                return
            self.measure(self._clock())
            message = {"type": "http.response.body", "body": with_slo_report(b"".join(self._held), self._entry)}
        self._begun += 1
        if self._start is not None:
            first = self._progress.request.first_token_s
            content = len(message.get("body", b"")) if last else None
            await self._send_start(None if first is None else first - self._entry.request.arrival_s, content)
        await self._send(message)
        self._written = self._begun
        if last:
            self.complete = self._ended = True

    async def _send_start(self, ttft_s: float | None, content_length: int | None = None) -> None:
        assert self._start is not None
        headers: Headers = [(k, v) for k, v in self._start.get("headers", ()) if k.lower() not in _OWN_HEADERS]
        headers.append((b"x-request-id", self._request_id))
        headers += first_byte_headers(self._entry, ttft_s)
        if content_length is not None:
            headers.append((b"content-length", str(content_length).encode()))
        else:
            headers += [(k, v) for k, v in self._start.get("headers", ()) if k.lower() == b"content-length"]
        start, self._start = {**self._start, "headers": headers}, None
        self._started = True
        await self._send(start)

    def stalled_since_last_asked(self) -> bool:
        """Whether what the client was being sent when this was last asked, it is being sent still."""
        stalled = self._begun_then == self._begun > self._written
        self._begun_then = self._begun
        return stalled

    async def end(self) -> None:
        """End a stream that is complete, if whoever serves it never did."""
        if not self._ended:
            self._ended = True
            async with _last_words():
                await self._send({"type": "http.response.body", "body": b""})

    async def fail(self, error: ApiError) -> None:
        """The engine was lost: answer with ``error``, or end the stream that has begun with an error event."""
        if self.complete:
            return
        async with _last_words():
            if not self._started:
                self.status = error.status
                await send_error(self._send, error, self._request_id)
            elif self._streaming:
                await self._send({"type": "http.response.body", "body": error.event()})
        # A document cut short cannot be mended: its content-length does not add up, and the client will see that.
        self.complete = self._ended = True

    def measure(self, now: float) -> None:
        """Write the measured TTFT, TPOT and e2e latency (s) into the ledger entry."""
        entry, progress = self._entry, self._progress
        request = entry.request
        if self._streaming and self._first_sent is not None:
            entry.ttft_s = self._first_sent - request.arrival_s
            if request.sequences == 1:
                entry.tpot_s = tpot(self._first_sent, self._last_sent, request.generated)
            else:
                entry.tpot_s = progress.tpot_s
            entry.e2e_s = self._last_sent - request.arrival_s
            return
        # Of an answer in one piece no token leaves early. Its first token counts when it leaves the engine.
        if request.first_token_s is not None:
            entry.ttft_s = request.first_token_s - request.arrival_s
        entry.tpot_s = progress.tpot_s
        entry.e2e_s = now - request.arrival_s


class ClientSide:
    """The client's ``receive`` once its body was read: all that can still come is that it leaves."""

    def __init__(self, receive: Receive) -> None:
        self.left: asyncio.Task[None] = asyncio.create_task(self._watch(receive))
        """Done once the client has left."""

    @staticmethod
    async def _watch(receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    def replay(self, body: bytes) -> Receive:
        """A ``receive`` for an engine's app: ``body`` once, then ``http.disconnect`` when the client leaves."""
        unread = [body]

        async def receive() -> Message:
            if unread:
                return {"type": "http.request", "body": unread.pop(), "more_body": False}
            await asyncio.wait({self.left})
            return {"type": "http.disconnect"}

        return receive

    def close(self) -> None:
        """Stop watching."""
        self.left.cancel()


@contextlib.asynccontextmanager
async def _last_words() -> AsyncIterator[None]:
    """Whoever has stopped reading does not read these either, and must not keep its place for them."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LAST_WORDS_S):
            yield


async def send_error(send: Send, error: ApiError, request_id: bytes = b"") -> None:
    """Answer with an `ApiError`."""
    body = error.body()
    headers: Headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if request_id:
        headers.append((b"x-request-id", request_id))
    await send({"type": "http.response.start", "status": error.status, "headers": headers + error.headers})
    await send({"type": "http.response.body", "body": body})


def _content_type(start: Message) -> bytes:
    return next((v for k, v in start.get("headers", ()) if k.lower() == b"content-type"), b"")


def _is_role_chunk(body: bytes) -> bool:
    return b'"role":' in body and b'"content":""' in body and body.count(b"data: ") == 1
