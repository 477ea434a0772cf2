"""A fixed number of slots that requests take, and wait for in order of arrival."""

from __future__ import annotations

import asyncio
from collections import deque


class Slots:
    """``count`` slots. `try_take` one, `wait` for one if that fails, and `give_back` each.

    As `asyncio.Semaphore`, which calls seven functions for each request that need not wait.

    INVARIANT: no slot is free while a request waits.
    """

    def __init__(self, count: int) -> None:
        self._free = count
        self._waiting: deque[asyncio.Future[None]] = deque()

    def try_take(self) -> bool:
        """Take a slot if one is free. Return False otherwise."""
        if not self._free:
            return False
        self._free -= 1
        return True

    async def wait(self) -> None:
        """Take a slot once the requests that wait already have theirs. Call this after `try_take` returned False."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(waiter)
        try:
            await waiter
        except asyncio.CancelledError:
            if not waiter.cancelled():
                # It got its slot in the turn of the event loop that cancelled it.
                self.give_back()
            raise

    def give_back(self) -> None:
        """Give a slot back, to the request that has waited longest."""
        while self._waiting:
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return
        self._free += 1
