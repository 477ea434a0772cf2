"""One call to an engine's app: it ends when the app returns or the client disconnects."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from engine_adapter.asgi import ClientConnection, ClientDisconnected, JsonBody, cancel_and_wait
from engine_adapter.engine import ASGIApp, Receive, Scope, Send
from gateway.api.failover import EngineHung, HangWatch
from gateway.api.response_relay import ResponseRelay

STALL_CHECKS = 6
"""Checks in the time that a client may make the engine wait. They sample how long that was."""


class ClientStalled(ClientDisconnected):
    """The client made the engine wait for too long, because it does not read its response."""


async def call_engine(
    app: ASGIApp,
    scope: Scope,
    body: JsonBody,
    relay: ResponseRelay,
    client: ClientConnection,
    stall_s: float,
    grace_s: float,
    watch: HangWatch | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> BaseException | None:
    """Call an engine's app and return the exception that it raised, or None. `EngineHung` if ``watch`` says so.

    ``stall_s``: seconds in total that the client may make the engine wait, because it does not read its response.
    ``grace_s``: seconds that the app has to return after the disconnect, before it is cancelled.

    Raises `ClientDisconnected` if the client disconnects before its response is complete, and `ClientStalled`.
    """
    call = asyncio.ensure_future(_run(app, scope, client.receive_for(body), relay.send))
    try:
        hung, stalls, check_s = False, 0, stall_s / STALL_CHECKS
        while not (stalls == STALL_CHECKS or hung or call.done() or client.disconnected.done()):
            timeout_s = check_s if watch is None else min(check_s, watch.wait_s(clock()))
            await asyncio.wait({call, client.disconnected}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if watch is not None and timeout_s < check_s:
                hung = not (call.done() or client.disconnected.done()) and watch.is_hung(clock())
                continue
            stalls += relay.is_blocked
        stalled = stalls == STALL_CHECKS
        # After a disconnect, vLLM's app may still send a response. Only what was sent before counts.
        disconnected = (client.disconnected.done() or stalled) and not relay.complete
        if not (call.done() or hung):
            await asyncio.wait({call}, timeout=grace_s)
    finally:
        await cancel_and_wait(call)
    # NOTE: asyncio logs an exception that is never retrieved, and its text may quote the request.
    error = None if call.cancelled() else call.exception()
    if disconnected:
        raise ClientStalled if stalled else ClientDisconnected
    return EngineHung("no token arrived in time") if hung else error


async def _run(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    await app(scope, receive, send)
