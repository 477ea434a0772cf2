"""One call to an engine's app: it ends when the app returns or the client disconnects."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

from engine_adapter.asgi import ClientDisconnected, DisconnectWatch, JsonBody
from engine_adapter.engine import ASGIApp, Scope
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
    client: DisconnectWatch,
    stall_s: float,
    grace_s: float,
    watch: HangWatch | None,
) -> BaseException | None:
    """Call an engine's app and return the exception that it raised, or None. `EngineHung` if ``watch`` says so.

    ``stall_s``: seconds in total that the client may make the engine wait, because it does not read its response.
    ``grace_s``: seconds that the app has to return after the disconnect, before it is cancelled.

    The app runs in the caller's task, since a task of its own costs 50 us.

    Raises `ClientDisconnected` if the client disconnects before its response is complete, and `ClientStalled`. The
    engine never sees the request of a client that has left already.
    """
    if client.disconnected.done():
        raise ClientDisconnected
    error: BaseException | None = None
    task = asyncio.current_task()
    assert task is not None
    cancellations = task.cancelling()
    observer = _CallObserver(task, relay, client, stall_s / STALL_CHECKS, grace_s, watch)
    try:
        observer.start()
        await app(scope, client.receive_for(body), relay.send)
    except asyncio.CancelledError:
        # By the observer, of the caller, which is raised below, or by something of the app's own.
        pass
    except Exception as caught:
        error = caught
    finally:
        observer.stop()
    if observer.cancelled:
        task.uncancel()
    if task.cancelling() > cancellations:
        # The app may have caught it.
        raise asyncio.CancelledError
    if observer.left_early:
        raise ClientStalled if observer.stalled else ClientDisconnected
    return EngineHung("no token arrived in time") if observer.hung else error


@dataclass(slots=True, eq=False)
class _CallObserver:
    """Cancels the call, which ``task`` makes, if the client disconnects or stalls, or the engine hangs.

    ``check_s``: seconds between two looks at whether the client reads. ``left_early``: the client disconnected or
    stalled before its response was complete. ``cancelled``: the call was cancelled here.
    """

    task: asyncio.Task[object]
    relay: ResponseRelay
    client: DisconnectWatch
    check_s: float
    grace_s: float
    watch: HangWatch | None
    left_early: bool = False
    stalled: bool = False
    hung: bool = False
    cancelled: bool = False
    _stalls: int = 0
    _ending: bool = False
    _loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    _timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Watch from now on."""
        self.client.disconnected.add_done_callback(self._on_disconnect)
        self._wait()

    def stop(self) -> None:
        """Watch no more: the app has returned."""
        disconnected = self.client.disconnected
        if not self._ending and disconnected.done():
            self.left_early = not self.relay.complete
        self._ending = True
        disconnected.remove_done_callback(self._on_disconnect)
        if self._timer is not None:
            self._timer.cancel()

    def _wait(self) -> None:
        hang_in_s = self.check_s if self.watch is None else self.watch.wait_s(time.monotonic())
        if hang_in_s < self.check_s:
            self._timer = self._loop.call_later(max(0.0, hang_in_s), self._check_engine)
        else:
            self._timer = self._loop.call_later(self.check_s, self._check_client)

    def _check_engine(self) -> None:
        if self.watch is not None and self.watch.is_hung(time.monotonic()):
            self.hung = self._ending = True
            self._cancel()
        else:
            self._wait()

    def _check_client(self) -> None:
        self._stalls += self.relay.is_blocked
        if self._stalls == STALL_CHECKS:
            self.stalled = True
            self._end()
        else:
            self._wait()

    def _on_disconnect(self, disconnected: asyncio.Future[None]) -> None:
        if not self._ending:
            self._end()

    def _end(self) -> None:
        """Give the app time to return. After a disconnect it may still send a response, which does not count."""
        self.left_early, self._ending = not self.relay.complete, True
        if self._timer is not None:
            self._timer.cancel()
        # NOTE: in a later iteration of the event loop, because a task that cancels itself is cancelled too late.
        self._timer = self._loop.call_later(self.grace_s, self._cancel)

    def _cancel(self) -> None:
        self.cancelled = True
        self.task.cancel()
