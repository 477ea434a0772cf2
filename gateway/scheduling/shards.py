"""Divides engines among several gateways. Every gateway computes the same division from the same engines, without
asking the others.

The rule is rendezvous hashing with equal shares:

    1 each pair of engine e and shard s has a weight, the hash of both
    2 pairs are taken by weight, the highest first: s gets e, unless e has a shard or s is full
    3 of n engines, a shard is full with floor(n / count), and n mod count shards are full with one more

INVARIANT: with at least as many engines as shards, each engine has one shard, and shares differ by at most one engine.

Plain rendezvous hashing leaves shares of 4 to 16 of 100 engines among ten shards. Clients are spread evenly over the
gateways, so the smallest share would limit all of them. The number at the end of an engine's name, modulo ``count``,
would divide as evenly; but a host name that is looked up gives addresses without numbers. An engine that joins or
leaves moves one or two other engines to another shard (`tests/gateway/scheduling/test_shards.py`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from hashlib import blake2b


@dataclass(frozen=True, slots=True)
class Shard:
    """One of ``count`` gateways that divide the engines; ``index`` is from 0 to ``count`` - 1."""

    index: int = 0
    count: int = 1

    def share(self, engines: Collection[str]) -> set[str]:
        """Return the engines of this shard, at least one if there are any.

        ``engines`` identify engines alike on all gateways, as addresses do. Fewer engines than shards are shared: a
        shard without one gets the engine of its highest weight, because its clients need one.
        """
        if self.count == 1:
            return set(engines)
        mine = {engine for engine, shard in owners(engines, self.count).items() if shard == self.index}
        if not mine and engines:
            mine = {max(engines, key=lambda engine: _weight(engine, self.index))}
        return mine

    def part(self, total: int) -> int:
        """Return this shard's part of ``total``, at least 1. The parts add up to ``total`` if it is ``count`` or more.

        The first shards get what division leaves.
        """
        each, more = divmod(total, self.count)
        return max(1, each + (self.index < more))


def owners(engines: Iterable[str], count: int) -> dict[str, int]:
    """Return the shard of each engine, from 0 to ``count`` - 1. Takes 1 ms for 100 engines and ten shards."""
    names = set(engines)
    full, larger = divmod(len(names), count)
    weights = sorted(((_weight(name, shard), name, shard) for name in names for shard in range(count)), reverse=True)
    sizes = [0] * count
    found: dict[str, int] = {}
    for _, name, shard in weights:
        if name in found or sizes[shard] > full or (sizes[shard] == full and not larger):
            continue
        larger -= sizes[shard] == full
        sizes[shard] += 1
        found[name] = shard
    return found


def _weight(engine: str, shard: int) -> bytes:
    # NOTE: Python's own hash differs between processes.
    return blake2b(f"{shard} {engine}".encode(), digest_size=8).digest()
