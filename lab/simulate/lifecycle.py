"""Engines that fail, start and stop during a simulation: failures, cold starts and autoscaling.

An engine serves, starts (its cold start), drains (it finishes what it has) or is stopped. Its GPU is in use unless it
is stopped. As in the gateway, the requests that wait at an engine that fails are placed again, and so are running
requests without a first token. Its other requests fail. An engine that begins to serve is offered its share of the
waiting requests.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from gateway.requests.request import Request
from lab.simulate.replica import Replica

ENGINE_LOST = "engine_lost"
"""Reason of a request that failed with its engine."""


@dataclass(frozen=True, slots=True)
class FleetLoad:
    """What an autoscaler sees at ``now`` (s): engines that serve and start, and requests that wait and run."""

    now: float
    serving: int
    starting: int
    waiting: int
    running: int


class Autoscaler(Protocol):
    """Sets the number of engines, every ``interval_s`` seconds."""

    interval_s: float

    def replicas(self, load: FleetLoad) -> int:
        """Return the wanted number of engines, at least 1."""


@dataclass(frozen=True, slots=True)
class Changes:
    """What happens to the engines.

    Attributes:
        failures: time (s) and number of each engine that dies then. Another one starts in its place.
        cold_start_s: seconds until an engine that starts serves.
        autoscaler: starts and drains engines; None keeps all of them.
        initial: engines that serve from the start; None for all.
    """

    failures: tuple[tuple[float, int], ...] = ()
    cold_start_s: float = 60.0
    autoscaler: Autoscaler | None = None
    initial: int | None = None


def parse_failure(text: str) -> tuple[float, int]:
    """Return the time (s) and the engine of ``AT`` or ``AT:REPLICA``, which is 0 by default. Raises ValueError."""
    at, _, replica = text.partition(":")
    try:
        return float(at), int(replica or 0)
    except ValueError:
        raise ValueError(
            f"--fail must have the form SECONDS or SECONDS:REPLICA, such as 60:1; got {text[:40]!r}"
        ) from None


State = Literal["serving", "starting", "draining", "stopped"]


class Lifecycle:
    """Applies `Changes` to ``engines``. ``place`` returns the engine for a request; ``next_s`` is the next change."""

    def __init__(self, changes: Changes, engines: Sequence[Replica], place: Callable[[Request], Replica]) -> None:
        for at_s, number in changes.failures:
            if not 0 <= number < len(engines) or not 0 <= at_s < math.inf:
                raise ValueError(f"a failure must have a time and be of one of the engines 0 to {len(engines) - 1}")
        self._changes, self._engines, self._place = changes, engines, place
        initial = len(engines) if changes.initial is None else min(max(changes.initial, 1), len(engines))
        self._states: list[State] = ["serving" if n < initial else "stopped" for n in range(len(engines))]
        self._serves_at = [math.inf] * len(engines)
        self._failures = sorted(changes.failures)
        self._decides_at = math.inf if changes.autoscaler is None else 0.0
        self._used_s, self._until_s = 0.0, 0.0
        self.sizes: list[tuple[float, int]] = []
        """Time (s) and number of engines that use a GPU, at each change."""
        for number in range(len(engines)):
            self._set(0.0, number, self._states[number])

    @property
    def next_s(self) -> float:
        """The time of the next change (s); infinite if none is planned."""
        return min(self._next_planned_s, self._decides_at)

    @property
    def _next_planned_s(self) -> float:
        return min([*(at_s for at_s, _ in self._failures[:1]), *self._serves_at])

    def is_next(self, event_s: float) -> bool:
        """Whether a change comes before the next other event, at ``event_s``.

        If there is no other event, only an engine that starts or fails can end the wait; an autoscaler asks for ever.
        """
        if event_s == math.inf:
            return self._next_planned_s < math.inf
        return self.next_s <= event_s

    def gpu_s(self, now: float) -> float:
        """Return the seconds that engines used GPUs until ``now``, summed over engines."""
        self._count(now)
        return self._used_s

    def apply(self, now: float) -> tuple[list[Replica], list[Request]]:
        """Apply the changes that are due. Returns the engines that got requests, and the requests that failed."""
        touched: list[Replica] = []
        failed: list[Request] = []
        while self._failures and self._failures[0][0] <= now:
            _, number = self._failures.pop(0)
            if self._states[number] in ("serving", "draining"):
                begun, again = self._engines[number].lose_requests()
                failed += begun
                self._start(now, number)
                touched += self._place_again(now, again, number)
        for number, at_s in enumerate(self._serves_at):
            if at_s <= now:
                touched += self._serve(now, number)
        # Requests that found no engine wait at one that is down.
        for number, engine in enumerate(self._engines):
            if self._states[number] != "serving" and engine.admission.waiting and "serving" in self._states:
                touched += self._place_again(now, engine.take_waiting())
            if self._states[number] == "draining" and not engine.admission.running:
                self._set(now, number, "stopped")
        if self._decides_at <= now and self._changes.autoscaler is not None:
            self._decides_at = now + self._changes.autoscaler.interval_s
            touched += self._scale(now, self._changes.autoscaler)
        return touched, failed

    def _scale(self, now: float, autoscaler: Autoscaler) -> list[Replica]:
        serving, starting = (self._states.count(state) for state in ("serving", "starting"))
        waiting = sum(len(engine.admission.waiting) for engine in self._engines)
        running = sum(len(engine.admission.running) for engine in self._engines)
        wanted = autoscaler.replicas(FleetLoad(now, serving, starting, waiting, running))
        more = min(max(wanted, 1), len(self._engines)) - serving - starting
        touched: list[Replica] = []
        for _ in range(more):
            # An engine that drains still has its weights: it serves again at once.
            if "draining" in self._states:
                touched += self._serve(now, self._states.index("draining"))
            elif "stopped" in self._states:
                self._start(now, self._states.index("stopped"))
        for _ in range(-more):
            if "starting" in self._states:
                self._set(now, self._last("starting"), "stopped")
            elif self._states.count("serving") > 1:
                number = self._last("serving")
                self._set(now, number, "draining")
                touched += self._place_again(now, self._engines[number].take_waiting())
        return touched

    def _last(self, state: State) -> int:
        return len(self._states) - 1 - self._states[::-1].index(state)

    def _serve(self, now: float, number: int) -> list[Replica]:
        """Have an engine serve, and place its share of the requests that wait for others again: see `Router.offer`."""
        self._set(now, number, "serving")
        others = [e for n, e in enumerate(self._engines) if n != number and self._states[n] == "serving"]
        every = len(others) + 1
        waiting = [(engine, request) for engine in others for request in engine.admission.waiting]
        moved = waiting[every - 1 :: every]
        for engine, request in moved:
            engine.admission.withdraw(request)
        return [self._engines[number], *self._place_again(now, [request for _, request in moved])]

    def _start(self, now: float, number: int) -> None:
        self._engines[number].restart()
        self._set(now, number, "starting")
        self._serves_at[number] = now + self._changes.cold_start_s

    def _set(self, now: float, number: int, state: State) -> None:
        self._count(now)
        self._states[number], self._serves_at[number] = state, math.inf
        engine = self._engines[number]
        engine.state.alive = state == "serving"
        engine.down = state in ("starting", "stopped")
        self.sizes.append((now, len(self._states) - self._states.count("stopped")))

    def _count(self, now: float) -> None:
        self._used_s += (now - self._until_s) * (len(self._states) - self._states.count("stopped"))
        self._until_s = now

    def _place_again(self, now: float, requests: Sequence[Request], lost_by: int | None = None) -> list[Replica]:
        touched = []
        for request in requests:
            request.wait_again()
            request.restore_bounds()
            if lost_by is not None:
                request.failed_on = (str(lost_by),)
            engine = self._place(request)
            engine.admission.submit(request)
            touched.append(engine)
        return touched
