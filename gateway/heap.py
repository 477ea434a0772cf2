"""Garbage collections of the gateway's process: rare ones of young objects, full ones in quiet moments.

Reference counting frees nearly everything. A collection of young objects visits those of the open requests, mostly in
vain, and Python starts one for each 700 new objects: for each few requests. Here it takes 50,000 objects.

A full collection visits every object and stops the event loop: with 10,000 open requests for half a second. Python
starts one each time that the heap has grown by a quarter, which is while requests arrive.
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

YOUNG_OBJECTS = 50_000
"""New objects after which the young ones are collected, in about 2 ms. With 700, Python's default, a request of 32
connections takes 5% more CPU time, and the last of 500 streams that start at once waits 1.4 times as long."""

YOUNG = 1
"""Collections of the middle generation, each after ten of young objects, after which a full one is worthwhile."""

MOST_YOUNG = 6
"""The same while requests are open: 3 million new objects. It bounds what garbage in reference cycles can hold.
Doubled while such collections find little."""

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
    """Within the block, collect as this module says, and exclude the objects that exist now from all collections.

    ``open_requests``: their current number.
    """
    before = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS, before[1], _NEVER)
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
