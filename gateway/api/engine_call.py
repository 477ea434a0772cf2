"""One call to an engine's app: it ends when the app returns or the client disconnects."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from engine_adapter.asgi import ClientConnection, ClientDisconnected, JsonBody, cancel_and_wait
from engine_adapter.engine import ASGIApp, Receive, Scope, Send
from gateway.api.failover import EngineHung, HangWatch
from gateway.api.response_relay import ResponseRelay


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

    ``stall_s``: seconds (up to twice that) after which a client that accepts no data counts as disconnected.
    ``grace_s``: seconds that the app has to return after the disconnect, before it is cancelled.

    Raises `ClientDisconnected` if the client disconnects before its response is complete.
    """
    call = asyncio.ensure_future(_run(app, scope, client.receive_for(body), relay.send))
    try:
        stalled = hung = False
        while not (stalled or hung or call.done() or client.disconnected.done()):
            timeout_s = stall_s if watch is None else min(stall_s, watch.wait_s(clock()))
            await asyncio.wait({call, client.disconnected}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if watch is not None and timeout_s < stall_s:
                hung = not (call.done() or client.disconnected.done()) and watch.is_hung(clock())
                continue
            stalled = relay.stalled_since_last_check()
        # After a disconnect, vLLM's app may still send a response. Only what was sent before counts.
        disconnected = (client.disconnected.done() or stalled) and not relay.complete
        if not (call.done() or hung):
            await asyncio.wait({call}, timeout=grace_s)
    finally:
        await cancel_and_wait(call)
    # NOTE: asyncio logs an exception that is never retrieved, and its text may quote the request.
    error = None if call.cancelled() else call.exception()
    if disconnected:
        raise ClientDisconnected
    return EngineHung("no token arrived in time") if hung else error


async def _run(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    await app(scope, receive, send)
