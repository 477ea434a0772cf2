"""One client request of a remote engine, and the messages that answer it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import aiohttp
import orjson

from engine_adapter.engine import FAILED_KEY, Scope, Send, TokenObserver
from engine_adapter.remote.counting import EventKind, TokenCounter
from engine_adapter.remote.request import CompletionPlan, downstream_headers

_DONE = b"data: [DONE]\n\n"
USUAL_DONE = (_DONE, b"data: [DONE]\r\n\r\n")
"""Forms of a completion's last event that the gateway recognises behind other events."""
_USUAL_ERROR = b'data: {"error"'


@dataclass(slots=True)
class ClientRequest:
    """One client request and the channel for its response. ``plan`` is None unless the request generates tokens."""

    scope: Scope
    plan: CompletionPlan | None
    observer: TokenObserver
    send: Send

    async def send_head(self, response: aiohttp.ClientResponse, altered: bool) -> None:
        """Send the status and the headers of the upstream response. ``altered``: as in `downstream_headers`."""
        headers = downstream_headers(response.raw_headers, altered)
        await self.send({"type": "http.response.start", "status": response.status, "headers": headers})

    async def send_body(self, data: bytes, more: bool) -> None:
        """Send a part of the body. ``more``: others follow."""
        await self.send({"type": "http.response.body", "body": data, "more_body": more})

    async def send_failure(self, data: bytes, more: bool) -> None:
        """Send a part of a 200 response that reports the engine's failure."""
        await self.send({"type": "http.response.body", "body": data, "more_body": more, FAILED_KEY: True})

    async def send_json(self, status: int, data: bytes, headers: Iterable[tuple[bytes, bytes]] = ()) -> None:
        """Send a whole JSON response. ``headers``: those of the upstream response, without its body's headers."""
        kept = [(name, value) for name, value in headers if name != b"content-type"]
        kept += [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(data))]
        await self.send({"type": "http.response.start", "status": status, "headers": kept})
        await self.send_body(data, more=False)

    async def send_last(self, kind: EventKind, event: bytes, counter: TokenCounter) -> None:
        """Send the event that ends a stream, in a message of its own so that the gateway recognises it.

        In a completion it gets the form that clients recognise, if the server uses another one.
        """
        if kind is EventKind.ERROR:
            if counter.errors_are_chunks and not event.startswith(_USUAL_ERROR):
                event = b"data: %b\n\n" % orjson.dumps(counter.error_document(counter.error or {}))
            await self.send_failure(event, more=True)
        elif not counter.errors_are_chunks:
            await self.send_body(event, more=True)
        if counter.errors_are_chunks:
            await self.send_body(_DONE, more=True)
