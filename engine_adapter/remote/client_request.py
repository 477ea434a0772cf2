"""One client request of a remote engine, and the messages that answer it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from engine_adapter.engine import FAILED_KEY, PASS_EVENT_KEY, PassEvent, Scope, Send, TokenObserver
from engine_adapter.remote.counting.completions import CompletionCounter
from engine_adapter.remote.counting.token_counter import EventKind, TokenCounter
from engine_adapter.remote.request import CompletionPlan, downstream_headers
from engine_adapter.remote.response import Response

USUAL_DONE = (CompletionCounter.done, b"data: [DONE]\r\n\r\n")
"""Forms of a completion's last event that the gateway recognises behind other events."""


class NullObserver:
    """Ignores what an engine reports: the observer of a request that has none."""

    def ignore(self, *reported: object) -> None:
        """Do nothing."""

    on_prompt = on_cached = on_tokens = on_unobserved = ignore


class BadUpstreamError(Exception):
    """The server's response is a failure although its status is not an error. The message says why."""


@dataclass(slots=True)
class ClientRequest:
    """One client request and the channel for its response. ``plan`` is None unless the request generates tokens."""

    scope: Scope
    plan: CompletionPlan | None
    observer: TokenObserver
    send: Send

    @property
    def pass_event(self) -> PassEvent | None:
        """What sends an event with a token at less cost than ``send``; None without it."""
        passes: PassEvent | None = self.scope.get(PASS_EVENT_KEY)
        return passes

    async def send_head(self, response: Response, altered: bool) -> None:
        """Send the status and the headers of the upstream response. ``altered``: as in `downstream_headers`."""
        headers = downstream_headers(response.headers, altered)
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

        It gets the form that clients recognise, if the server uses another one.
        """
        if kind is EventKind.ERROR:
            await self.send_failure(counter.error_event(event), more=True)
        if counter.done or kind is not EventKind.ERROR:
            await self.send_body(counter.done or event, more=True)
