"""Routing policies: which engine of a pool is the best one for a request. The router knows which engines rest.

A routing policy sees the engine queues of the pool, so it works with any number of engines and any mix of them. Its
cost for a request is linear in the number of engines, except for `headroom`. It hardly depends on the number of
requests that they have (`gateway.scheduling.expected_batch`).
"""

from __future__ import annotations

import random
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from gateway.requests.request import Request
from gateway.scheduling.engine_queue import EngineQueue
from gateway.scheduling.headroom import Headroom
from gateway.scheduling.placement import free_memory_load, load, ranks, requests_of

BALANCED_REQUESTS, BALANCED_RATIO = 64, 1.5
"""Requests by which engines differ, and their ratio, from which `PrefixAffinity` balances: SGLang's defaults."""

WORTHWHILE_HIT = 0.5
"""Share of a prompt in a prefix cache from which `PrefixAffinity` follows it: SGLang's default."""


MAX_COUNTED = 100_000
"""Pairs of engine and pool that `LeastLoad` counts, so that invented model names need no memory."""


class Routing(Protocol):
    """Chooses among engines."""

    name: str

    def best(self, request: Request, queues: Sequence[EngineQueue]) -> EngineQueue:
        """Return the best of ``queues``, at least two, for ``request``."""

    def on_sent(self, request: Request, engine_queue: EngineQueue) -> None:
        """Note that ``request`` was queued for the engine."""


class _ByKey(ABC):
    """A routing policy that ranks all engines by a key. By default it remembers nothing."""

    @abstractmethod
    def keys(self, request: Request, queues: Sequence[EngineQueue]) -> Sequence[Any]:
        """Return a sort key for each of ``queues``; the best engine for ``request`` has the smallest."""

    def best(self, request: Request, queues: Sequence[EngineQueue]) -> EngineQueue:
        """See `Routing.best`."""
        keys = self.keys(request, queues)
        return queues[min(range(len(keys)), key=keys.__getitem__)]

    def on_sent(self, request: Request, engine_queue: EngineQueue) -> None:  # noqa: B027 (optional to override)
        """Do nothing."""


class LeastLoad(_ByKey):
    """The engine with the least predicted prefill time, this prompt included (`placement.load`)."""

    name = "least_load"

    def __init__(self) -> None:
        self._sent: dict[str, int] = {}
        self._at_last: dict[tuple[str, str], int] = {}

    def keys(self, request: Request, queues: Sequence[EngineQueue]) -> Sequence[Any]:
        """See `_ByKey.keys`."""
        pool, now = request.pool, queues[0].now()
        sent, at_last = self._sent.get(pool, 0), self._at_last
        return ranks(
            [
                load(queue.admission, request, now, sent - at_last.setdefault((queue.engine.name, pool), sent))
                for queue in queues
            ]
        )

    def on_sent(self, request: Request, engine_queue: EngineQueue) -> None:
        """Count the requests of each pool, and how many there were at the engine's last one."""
        pool = request.pool
        if len(self._at_last) > MAX_COUNTED:
            self._sent.clear()
            self._at_last.clear()
        self._sent[pool] = self._at_last[engine_queue.engine.name, pool] = self._sent.get(pool, 0) + 1


class LeastMemory(_ByKey):
    """The engine with the most KV memory left (arXiv 2504.14966, algorithm 2)."""

    name = "most_free_memory"

    def keys(self, request: Request, queues: Sequence[EngineQueue]) -> Sequence[Any]:
        """See `_ByKey.keys`."""
        now = queues[0].now()
        return ranks([free_memory_load(queue.admission, now) for queue in queues])


class RoundRobin(_ByKey):
    """The engine whose last request is the longest ago."""

    name = "round_robin"

    def __init__(self) -> None:
        self._sent = 0
        self._last: dict[str, int] = {}

    def keys(self, request: Request, queues: Sequence[EngineQueue]) -> Sequence[Any]:
        """See `_ByKey.keys`."""
        return [self._last.get(queue.engine.name, 0) for queue in queues]

    def on_sent(self, request: Request, engine_queue: EngineQueue) -> None:
        """See `Routing.on_sent`."""
        self._sent += 1
        self._last[engine_queue.engine.name] = self._sent


class LeastRequests(_ByKey):
    """The engine with the fewest requests."""

    name = "least_requests"

    def keys(self, request: Request, queues: Sequence[EngineQueue]) -> Sequence[Any]:
        """See `_ByKey.keys`."""
        return [requests_of(queue.admission) for queue in queues]


class PowerOfTwo(_ByKey):
    """Of two engines that the request's id picks, the one with fewer requests."""

    name = "power_of_two"

    def keys(self, request: Request, queues: Sequence[EngineQueue]) -> Sequence[Any]:
        """See `_ByKey.keys`."""
        picked = random.Random(zlib.crc32(request.id.encode())).sample(range(len(queues)), 2)
        return [(at not in picked, requests_of(queue.admission)) for at, queue in enumerate(queues)]


class PrefixAffinity(_ByKey):
    """The engine that has most of the prompt in its prefix cache, unless the engines are out of balance.

    The rule of SGLang's router: the engine with the fewest requests gets a prompt of which no engine has a worthwhile
    part, and every prompt while the engines differ by more than ``balanced_requests`` and ``balanced_ratio``.
    """

    name = "prefix_affinity"

    def __init__(self, balanced_requests: int = BALANCED_REQUESTS, balanced_ratio: float = BALANCED_RATIO) -> None:
        self._balanced_requests, self._balanced_ratio = balanced_requests, balanced_ratio

    def keys(self, request: Request, queues: Sequence[EngineQueue]) -> Sequence[Any]:
        """See `_ByKey.keys`."""
        requests = [requests_of(queue.admission) for queue in queues]
        most, least = max(requests), min(requests)
        if most - least > self._balanced_requests and most > self._balanced_ratio * least:
            return requests
        hits = [queue.admission.prefixes.cached_tokens(request) for queue in queues]
        if max(hits) < WORTHWHILE_HIT * request.prompt_tokens:
            return requests
        return [(-hit, count) for hit, count in zip(hits, requests, strict=True)]


ROUTINGS: dict[str, Callable[[], Routing]] = {
    kind.name: kind
    for kind in (LeastLoad, Headroom, RoundRobin, LeastRequests, PowerOfTwo, PrefixAffinity, LeastMemory)
}
"""Routing policies by name, as a configuration file names them."""


def make_routing(name: str) -> Routing:
    """Return the routing policy called ``name``. Raises ValueError; the message lists the known ones."""
    if name not in ROUTINGS:
        raise ValueError(f"no routing is called {name!r}; choose one of {', '.join(ROUTINGS)}")
    return ROUTINGS[name]()
