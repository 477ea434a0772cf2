"""A bounded resource that tenants share, such that no tenant can take all of it.

The rule is the dynamic threshold of shared switch buffers (Choudhury and Hahne, 1998). A tenant that already holds
units may hold at most `FREE_FACTOR` times the free units, scaled by its weight. A single tenant gets nearly all of the
units. Several tenants that want more get equal parts. A tenant that holds none can always take a unit while one is
free.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import NamedTuple
from weakref import WeakValueDictionary

FREE_FACTOR = 8
"""How many times the free units one tenant may hold: alone 8/9 of the resource. Convention, usual in switches."""


class Sharer(NamedTuple):
    """One of those that share a resource: a tenant, or the address of a client without a key.

    The sharer without a name may take everything: no other one is known.
    """

    name: str = ""
    weight: float = 1.0


ONLY_SHARER = Sharer()


@dataclass(slots=True)
class _Part:
    weight: float
    count: int = 0


class SharedLimit:
    """The units of a resource: ``limit`` in total, ``used`` now."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self._parts: dict[str, _Part] = {}
        self._weights = 0.0
        self._freed = asyncio.Event()
        self._waiting = 0
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    def fits(self, sharer: Sharer, count: int = 1, *, freed: int = 0, own: int = 0) -> bool:
        """Return whether ``sharer`` may take ``count`` units once ``freed`` more are free, ``own`` of them its own."""
        free = self.limit - self.used + freed - count
        if free < 0 or not sharer.name:
            return free >= 0
        part = self._parts.get(sharer.name)
        if part is None or part.count <= own:
            return True
        return part.count - own + count <= self._free_factor(part) * free

    def left(self, sharer: Sharer) -> float:
        """Return how many more units ``sharer`` may take while no other one takes or frees any."""
        free, part = self.limit - self.used, self._parts.get(sharer.name)
        if part is None:
            return free
        factor = self._free_factor(part)
        return (factor * free - part.count) / (1 + factor)

    def _free_factor(self, part: _Part) -> float:
        """Return how many times the free units a sharer may hold."""
        return FREE_FACTOR * part.weight * len(self._parts) / self._weights

    def has_room(self, count: int = 1) -> bool:
        """Return whether ``count`` units are free, so that only its part can keep a sharer from them."""
        return self.used + count <= self.limit

    def level(self, sharer: Sharer, count: int = 0) -> float:
        """Return the units by weight that ``sharer`` would hold with ``count`` more."""
        part = self._parts.get(sharer.name)
        return ((0 if part is None else part.count) + count) / sharer.weight

    def try_take(self, sharer: Sharer, count: int = 1) -> bool:
        """Take ``count`` units if that is possible at once. Return False otherwise."""
        turn = self._turns.get(sharer.name) if self._turns else None
        if (turn is not None and turn.locked()) or not self.fits(sharer, count):
            return False
        self.take(sharer, count)
        return True

    def take(self, sharer: Sharer, count: int = 1) -> None:
        """Take ``count`` units, which must fit."""
        self.used += count
        if sharer.name:
            part = self._parts.get(sharer.name)
            if part is None:
                part = self._parts[sharer.name] = _Part(sharer.weight)
                self._weights += part.weight
            part.count += count

    def free(self, sharer: Sharer, count: int = 1) -> None:
        """Give ``count`` units back."""
        self.used -= count
        part = self._parts.get(sharer.name)
        if part is not None:
            part.count -= count
            if not part.count:
                del self._parts[sharer.name]
                # Without parts, rounding errors end too.
                self._weights = self._weights - part.weight if self._parts else 0.0
        self.wake()

    def wake(self) -> None:
        """Let waiting requests check again whether they fit."""
        if self._waiting:
            self._freed.set()
            self._freed.clear()

    def turn(self, sharer: Sharer) -> asyncio.Lock:
        """Return the lock that puts the requests of ``sharer`` which wait in order of arrival."""
        turn = self._turns.get(sharer.name)
        if turn is None:
            turn = self._turns[sharer.name] = asyncio.Lock()
        return turn

    async def acquire(self, sharer: Sharer) -> None:
        """Take one unit, after the requests of ``sharer`` that wait already."""
        async with self.turn(sharer):
            while not self.fits(sharer):
                await self.until_freed()
            self.take(sharer)

    async def until_freed(self) -> None:
        """Wait until units are given back."""
        self._waiting += 1
        try:
            await self._freed.wait()
        finally:
            self._waiting -= 1
