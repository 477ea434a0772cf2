"""In which turn of the event loop a request starts: operators' requests at once, a few others in each turn."""

from __future__ import annotations

import asyncio
import contextvars
from collections import OrderedDict
from collections.abc import Callable

ARRIVED_KEY = "antares.arrived"
"""ASGI scope key of when a request arrived (monotonic s), for a request that waited for its turn."""

PER_TURN = 32
"""Requests that start in one turn of the event loop. Each takes 0.1 to 0.8 ms until it waits for something, so a turn
lasts milliseconds, and `/health` answers within a few turns. Measured with 10,000 requests at once."""


class StartQueue:
    """Requests that wait for their turn to start, in order of arrival.

    A request is named by any object. Requests that started are forgotten, so connections bound its size.
    """

    def __init__(self) -> None:
        self._waiting: OrderedDict[object, Callable[[], None]] = OrderedDict()
        self._started = 0
        # A request may start in the task of the one before it, whose context variables no other one may see.
        self._context = contextvars.Context()

    def __len__(self) -> int:
        return len(self._waiting)

    def take_turn(self) -> bool:
        """Whether a request may start now. It counts as started then."""
        if self._waiting or self._started >= PER_TURN:
            return False
        if not self._started:
            asyncio.get_running_loop().call_soon(self._next_turn, context=self._context)
        self._started += 1
        return True

    def wait(self, request: object, start: Callable[[], None]) -> None:
        """Call ``start`` in a later turn. Call this after `take_turn` returned False."""
        self._waiting[request] = start

    def withdraw(self, request: object) -> None:
        """Forget ``request`` if it waits."""
        self._waiting.pop(request, None)

    def _next_turn(self) -> None:
        self._started = 0
        while self._waiting and self._started < PER_TURN:
            self._started += 1
            _, start = self._waiting.popitem(last=False)
            start()
        if self._started:
            asyncio.get_running_loop().call_soon(self._next_turn, context=self._context)
