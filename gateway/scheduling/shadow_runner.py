"""The shadows of one lane: when they look, and what keeps them from harming the policy that decides.

- They look after the lane has decided, from a timer of their own: nobody waits for them.
- They are *paced*: after looks that took s seconds, the next come no sooner than s / `MOST_SHARE` later. However much
  waits, they take that share of the event loop's time at most; with more, they look less often.
- What they are shown are copies, and what they raise is caught. One that fails, or that is slow again and again, is
  switched off with one line in the log; the others go on.
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

MOST_SHARE = 0.02
"""Share of the event loop's time that the looks of one lane's shadows may take."""

LEAST_PAUSE_S = 0.002
"""Between two looks. What happens in the meantime is decided on together, as it would be in an engine's step."""

IDLE_PAUSE_S = 0.1
"""While anything is in the books they look so often at least: guesses end without anybody telling."""

SLOW_LOOK_S, SLOW_LOOKS = 0.05, 5
"""A shadow that holds up the event loop so long, so many times running, is switched off."""

P = ParamSpec("P")
T = TypeVar("T")


class ShadowRunner:
    """``shadows`` beside the lane of one engine; with none, nothing here costs more than a call."""

    def __init__(
        self,
        shadows: Iterable[Shadow] = (),
        engine: EngineState | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.all = tuple(shadows)
        self._up = list(self.all)
        self._engine = engine
        self._clock = clock
        self._slow = dict.fromkeys(self.all, 0)
        self._timer: asyncio.TimerHandle | None = None
        self._woken = False
        self._rested_at = 0.0

    # --- what the lane tells them -----------------------------------------------------------------------------------

    def submitted(self, request: Request) -> None:
        """``request`` came in."""
        self._tell(Shadow.submitted, request)
        self.wake()

    def admitted(self, request: Request) -> None:
        """The active policy admitted ``request``."""
        self._tell(Shadow.admitted, request)

    def rejected(self, request: Request) -> None:
        """The active policy rejected ``request``."""
        self._tell(Shadow.rejected, request)

    def withdrawn(self, request: Request) -> None:
        """``request`` waits no more, undecided."""
        self._tell(Shadow.withdrawn, request)

    def left(self, request: Request) -> None:
        """The engine is through with ``request``."""
        self._tell(Shadow.left, request)

    def engine_lost(self) -> None:
        """The engine went down."""
        self._tell(Shadow.engine_lost)

    def wake(self) -> None:
        """Something changed that a policy may want to act on."""
        if self._up and not self._woken and any(shadow.waiting for shadow in self._up):
            self._woken = True
            self._look_at(self._clock() + LEAST_PAUSE_S)

    def close(self) -> None:
        """The gateway shuts down."""
        self._up.clear()
        if self._timer is not None:
            self._timer.cancel()

    # --- looking ----------------------------------------------------------------------------------------------------

    def _look_at(self, at: float) -> None:
        """Look at ``at`` (s), or as soon after as the pace allows."""
        if self._timer is not None:
            self._timer.cancel()
        delay = max(at, self._rested_at) - self._clock()
        self._timer = asyncio.get_running_loop().call_later(max(0.0, delay), self._look)

    def _look(self) -> None:
        self._woken, self._timer = False, None
        if self._engine is None or not self._engine.alive:
            return  # its return wakes us
        now = self._clock()
        again, spent = now + IDLE_PAUSE_S, 0.0
        for shadow in list(self._up):
            before = shadow.seconds
            recheck_at = self._guarded(shadow, Shadow.look, now)
            took = shadow.seconds - before
            spent += took
            self._judge_pace(shadow, took)
            if recheck_at is not None:
                again = min(again, max(recheck_at, now + LEAST_PAUSE_S))
        self._rested_at = now + spent / MOST_SHARE
        if any(shadow.waiting or shadow.running for shadow in self._up):
            self._look_at(again)

    def _judge_pace(self, shadow: Shadow, took: float) -> None:
        self._slow[shadow] = self._slow[shadow] + 1 if took > SLOW_LOOK_S else 0
        if shadow.up and self._slow[shadow] >= SLOW_LOOKS:
            self._switch_off(shadow, f"{SLOW_LOOKS} decisions running took more than {SLOW_LOOK_S * 1000:.0f} ms")

    # --- guarding ---------------------------------------------------------------------------------------------------

    def _tell(self, event: Callable[Concatenate[Shadow, P], None], *args: P.args, **kwargs: P.kwargs) -> None:
        for shadow in tuple(self._up):
            self._guarded(shadow, event, *args, **kwargs)

    def _guarded(
        self, shadow: Shadow, call: Callable[Concatenate[Shadow, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T | None:
        started = time.perf_counter()
        try:
            return call(shadow, *args, **kwargs)
        except Exception as error:
            self._switch_off(shadow, f"it failed with {type(error).__name__}", error)
            return None
        finally:
            shadow.seconds += time.perf_counter() - started

    def _switch_off(self, shadow: Shadow, why: str, error: Exception | None = None) -> None:
        self._up.remove(shadow)
        shadow.switch_off()
        log.error("shadow %s is switched off: %s", shadow.name, why, exc_info=error)
