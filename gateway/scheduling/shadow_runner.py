"""Runs the shadow policies of one engine without harm to the active policy.

- Shadows decide from a timer of their own, after the active policy, so no request waits for them.
- They are rate-limited: after updates that took s seconds, the next update starts no sooner than s / `MAX_TIME_SHARE`
  later. With more waiting requests they decide less often.
- They decide on copies, and their exceptions are caught. A shadow that raises, or that is slow several times in a row,
  is disabled with one line in the log. The other shadows continue.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from typing import Concatenate, ParamSpec, TypeVar

from engine_adapter.engine import EngineState
from gateway.requests.request import Request
from gateway.scheduling.shadow import Shadow

log = logging.getLogger("antares.shadow")

MAX_TIME_SHARE = 0.02
"""Largest share of the event loop's time for the shadows of one engine."""

MIN_INTERVAL_S = 0.002
"""Shortest time between two updates (s). Events in between are decided together, as in one step of an engine."""

MAX_INTERVAL_S = 0.1
"""Longest time between two updates while a shadow has requests (s), since estimated ends raise no event."""

SLOW_UPDATE_S, MAX_SLOW_UPDATES = 0.05, 5
"""A shadow is disabled after ``MAX_SLOW_UPDATES`` updates in a row that each took longer than ``SLOW_UPDATE_S`` (s)."""

P = ParamSpec("P")
T = TypeVar("T")


class ShadowRunner:
    """Passes the events of one engine queue to ``shadows`` and updates them. Without shadows its methods do nothing."""

    def __init__(
        self,
        shadows: Iterable[Shadow],
        engine: EngineState | None,
        clock: Callable[[], float],
    ) -> None:
        self.all = tuple(shadows)
        self._active = list(self.all)
        self._engine = engine
        self._clock = clock
        self._slow_updates = dict.fromkeys(self.all, 0)
        self._timer: asyncio.TimerHandle | None = None
        self._woken = False
        self._not_before_s = 0.0

    def replace(self, shadows: Iterable[Shadow]) -> None:
        """Run ``shadows`` from now on. A shadow that already ran keeps its requests and counts, unless disabled."""
        kept = set(self._active)
        new = tuple(shadows)
        self._active = [shadow for shadow in new if shadow in kept or shadow not in self.all]
        self._slow_updates = {shadow: self._slow_updates.get(shadow, 0) for shadow in new}
        self.all = new

    # --- events -----------------------------------------------------------------------------------------------------

    def submitted(self, request: Request) -> None:
        """``request`` arrived."""
        if not self._active:
            return
        self._notify(Shadow.submitted, request)
        self.wake()

    def admitted(self, request: Request) -> None:
        """The active policy admitted ``request``."""
        self._notify(Shadow.admitted, request)

    def rejected(self, request: Request) -> None:
        """The active policy rejected ``request``."""
        self._notify(Shadow.rejected, request)

    def withdrawn(self, request: Request) -> None:
        """``request`` stopped waiting before the active policy decided."""
        self._notify(Shadow.withdrawn, request)

    def left(self, request: Request) -> None:
        """The engine has finished ``request``."""
        self._notify(Shadow.left, request)

    def engine_lost(self) -> None:
        """The engine went down."""
        self._notify(Shadow.engine_lost)

    def wake(self) -> None:
        """Schedule an update, because something changed that a policy may act on."""
        if self._active and not self._woken and any(shadow.waiting for shadow in self._active):
            self._woken = True
            self._schedule(self._clock() + MIN_INTERVAL_S)

    def close(self) -> None:
        """Stop all updates."""
        self._active.clear()
        if self._timer is not None:
            self._timer.cancel()

    # --- updates ----------------------------------------------------------------------------------------------------

    def _schedule(self, at_s: float) -> None:
        """Update at ``at_s``, or later if the time share requires it."""
        if self._timer is not None:
            self._timer.cancel()
        delay_s = max(at_s, self._not_before_s) - self._clock()
        self._timer = asyncio.get_running_loop().call_later(max(0.0, delay_s), self._update)

    def _update(self) -> None:
        self._woken, self._timer = False, None
        if self._engine is None or not self._engine.alive:
            return  # the engine queue calls `wake` when the engine is back
        now = self._clock()
        next_s, spent_s = now + MAX_INTERVAL_S, 0.0
        for shadow in list(self._active):
            before_s = shadow.seconds
            recheck_at = self._call(shadow, Shadow.update, now)
            took_s = shadow.seconds - before_s
            spent_s += took_s
            self._disable_if_slow(shadow, took_s)
            if recheck_at is not None:
                next_s = min(next_s, max(recheck_at, now + MIN_INTERVAL_S))
        self._not_before_s = now + spent_s / MAX_TIME_SHARE
        if any(shadow.waiting or shadow.running for shadow in self._active):
            self._schedule(next_s)

    def _disable_if_slow(self, shadow: Shadow, took_s: float) -> None:
        self._slow_updates[shadow] = self._slow_updates[shadow] + 1 if took_s > SLOW_UPDATE_S else 0
        if shadow.up and self._slow_updates[shadow] >= MAX_SLOW_UPDATES:
            limit_ms = SLOW_UPDATE_S * 1000
            self._disable(shadow, f"{MAX_SLOW_UPDATES} updates in a row took more than {limit_ms:.0f} ms each")

    # --- isolation --------------------------------------------------------------------------------------------------

    def _notify(self, event: Callable[Concatenate[Shadow, P], None], *args: P.args, **kwargs: P.kwargs) -> None:
        for shadow in tuple(self._active):
            self._call(shadow, event, *args, **kwargs)

    def _call(
        self, shadow: Shadow, method: Callable[Concatenate[Shadow, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T | None:
        """Call ``method`` and add its time to the shadow's; disable the shadow if it raises."""
        started = time.perf_counter()
        try:
            return method(shadow, *args, **kwargs)
        except Exception as error:
            self._disable(shadow, f"it raised {type(error).__name__}", error)
            return None
        finally:
            shadow.seconds += time.perf_counter() - started

    def _disable(self, shadow: Shadow, reason: str, error: Exception | None = None) -> None:
        self._active.remove(shadow)
        shadow.disable()
        log.error("shadow policy %s is disabled: %s", shadow.name, reason, exc_info=error)
