"""Full garbage collections of the gateway's process, in quiet moments.

A full collection visits every object and stops the event loop: with 10,000 open requests for half a second. Python
starts one each time that the heap has grown by a quarter, which is while requests arrive. Reference counting frees
nearly everything, and the collections of young objects, which take a millisecond, stay as they are.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from engine_adapter.asgi import cancel_and_wait

CHECK_S = 1.0
"""Seconds between checks whether a full collection is due."""

QUIET = 64
"""Open requests up to which a full collection is quick: it takes some milliseconds."""

YOUNG = 10
"""Collections of young objects after which a full one is worthwhile; Python's default."""

MOST_YOUNG = 400
"""Collections of young objects after which a full one runs although requests are open, about 3 million new objects.
It bounds what garbage in reference cycles can hold. Doubled while such collections find little."""

FOUND_SHARE = 0.1
"""Share of the new objects that a full collection must find to count as useful."""

_NEVER = 1_000_000


class FullCollections:
    """Decides when to run a full collection. ``open_requests``: their current number."""

    def __init__(self, open_requests: Callable[[], int]) -> None:
        self._open_requests = open_requests
        self._most_young = MOST_YOUNG

    def check(self) -> bool:
        """Run a full collection if one is due. Returns whether it did."""
        young = gc.get_count()[2]
        quiet = self._open_requests() <= QUIET
        if young < (YOUNG if quiet else self._most_young):
            return False
        objects = young * gc.get_threshold()[0] * gc.get_threshold()[1]
        found = gc.collect()
        useful = quiet or found > FOUND_SHARE * objects
        self._most_young = MOST_YOUNG if useful else 2 * self._most_young
        return True


@asynccontextmanager
async def collecting_when_quiet(open_requests: Callable[[], int]) -> AsyncIterator[None]:
    """Within the block, run full collections in quiet moments, and exclude the objects that exist now from them.

    ``open_requests``: their current number.
    """
    before = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(before[0], before[1], _NEVER)
    checking = asyncio.create_task(_check(FullCollections(open_requests)), name="full collections")
    try:
        yield
    finally:
        await cancel_and_wait(checking)
        gc.set_threshold(*before)
        gc.unfreeze()


async def _check(collections: FullCollections) -> None:
    while True:
        await asyncio.sleep(CHECK_S)
        collections.check()
