"""The KV memory of a simulated engine, in blocks, with vLLM's prefix caching.

A block that is full of computed tokens is cached under its hash. The hash is chained: it covers the block's tokens and
all tokens before it, so equal hashes mean equal prefixes. Sequences with the same prefix share its blocks. A block
that no sequence holds is free, but stays cached until its memory is needed, the least recently used block first. A
sequence frees its last block first, so that the tail of a prefix is evicted before its head. Free blocks without a hash
are allocated before any cached block is evicted.

One difference from vLLM: if two sequences compute the same block at the same time, only one copy is cached.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from itertools import islice


class KvBlocks:
    """Counts free blocks and knows which cached blocks are held.

    INVARIANT: a block is held, free and cached, or free without content; cached free blocks are part of ``free``.

    Attributes:
        total: number of blocks.
        free: blocks that no sequence holds.
    """

    def __init__(self, total: int) -> None:
        self.total = self.free = total
        self._holders: dict[int, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()
        """Cached blocks that no sequence holds, least recently used first."""

    def __contains__(self, block_hash: int) -> bool:
        return block_hash in self._holders or block_hash in self._idle

    def hit(self, hashes: Sequence[int], limit: int) -> tuple[int, int]:
        """Return how many leading ``hashes`` are cached, at most ``limit``, and how many of these blocks are free."""
        holders, idle, cached, free = self._holders, self._idle, 0, 0
        for block_hash in islice(hashes, limit):
            if block_hash in idle:
                free += 1
            elif block_hash not in holders:
                break
            cached += 1
        return cached, free

    def hold(self, hashes: Iterable[int]) -> None:
        """Add a holder to each of these cached blocks."""
        holders, idle = self._holders, self._idle
        for block_hash in hashes:
            if block_hash in idle:
                del idle[block_hash]
                self.free -= 1
                holders[block_hash] = 1
            else:
                holders[block_hash] += 1

    def allocate(self, count: int) -> None:
        """Take ``count`` blocks for new content; evict cached ones if no others are free. ``free`` must suffice."""
        self.free -= count
        idle = self._idle
        while len(idle) > self.free:
            idle.popitem(last=False)

    def publish(self, block_hash: int) -> bool:
        """Cache an allocated block that is now full; return False if a sequence holds another copy already."""
        if block_hash in self._holders:
            return False
        # An idle copy becomes free memory without content.
        self._idle.pop(block_hash, None)
        self._holders[block_hash] = 1
        return True

    def release(self, hashes: Sequence[int], uncached: int) -> None:
        """Free the blocks of one sequence: its cached blocks ``hashes``, in order, and ``uncached`` others."""
        holders = self._holders
        self.free += uncached
        for block_hash in reversed(hashes):
            left = holders[block_hash] - 1
            if left:
                holders[block_hash] = left
            else:
                del holders[block_hash]
                self._idle[block_hash] = None
                self.free += 1

    def clear(self) -> None:
        """Free all blocks and empty the cache, as a restart does."""
        self.free = self.total
        self._holders.clear()
        self._idle.clear()
