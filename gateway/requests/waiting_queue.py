"""The requests that wait in front of one engine, in the order of its policy."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import overload

from gateway.requests.request import Request
from gateway.requests.waiting_arrays import WaitingArrays, WaitingTable

_MAX_UPDATES = 64
"""Updates in a row that are made in the table, whatever its size. After more, building a new one is cheaper."""

Order = Callable[[Request], tuple[float, ...]]
"""A request's sort key; the smallest comes first, and equal keys stay in order of arrival."""


class WaitingQueue(Sequence[Request]):
    """A sequence of requests sorted by ``order``. Adding or removing one costs O(log n) comparisons.

    A request's key and its row in `arrays` are read when it is added; call `reorder` after a change.
    """

    def __init__(self, order: Order) -> None:
        self.by_class: Counter[str] = Counter()
        """Number of waiting requests by SLO class."""
        self.by_tenant: dict[str, int] = {}
        """Number of waiting requests by tenant; only tenants with any."""
        self.weights: dict[str, float] = {}
        """Weight of each of these tenants."""
        self._of: dict[str, dict[str, dict[str, Request]]] = {}
        """The waiting requests by class, tenant and id, oldest first; only tenants with any."""
        self._order = order
        self._keys: list[tuple[float, ...]] = []
        self._requests: list[Request] = []
        self._key_of: dict[str, tuple[float, ...]] = {}
        self._added = 0
        self._table: WaitingTable | None = None
        """Built at the first call of `arrays`: most policies never call it."""
        self._updates = 0
        """Insertions and deletions since the last call of `arrays`."""

    def add(self, request: Request) -> None:
        """Insert ``request``; its id must not be in the queue."""
        self._added += 1
        self._insert(request, self._added)
        self.by_class[request.slo_class] += 1
        self.by_tenant[request.tenant] = self.by_tenant.get(request.tenant, 0) + 1
        self.weights[request.tenant] = request.weight
        self._of.setdefault(request.slo_class, {}).setdefault(request.tenant, {})[request.id] = request

    def remove(self, request: Request) -> bool:
        """Remove ``request``; return False when it was not in the queue."""
        if request.id not in self._key_of:
            return False
        self._delete(request)
        self.by_class[request.slo_class] -= 1
        self.by_tenant[request.tenant] -= 1
        if not self.by_tenant[request.tenant]:
            del self.by_tenant[request.tenant], self.weights[request.tenant]
        own = self._of[request.slo_class]
        del own[request.tenant][request.id]
        if not own[request.tenant]:
            del own[request.tenant]
        return True

    def displaced_by(self, request: Request) -> Request | None:
        """Return which waiting request of its full class gives way to ``request``; None if ``request`` itself does.

        It is the newest request of the tenant that has the most waiting by weight, if that is more than the tenant of
        ``request`` would have.
        """
        tenants = self._of.get(request.slo_class, {})
        most, loser = (len(tenants.get(request.tenant, ())) + 1) / request.weight, None
        for tenant, own in tenants.items():
            newest = next(reversed(own.values()))
            if tenant != request.tenant and len(own) / newest.weight > most:
                most, loser = len(own) / newest.weight, newest
        return loser

    def reorder(self, request: Request) -> None:
        """Move ``request`` to where its changed key belongs; among equal keys it stays in order of arrival."""
        if request.id in self._key_of:
            self._insert(request, self._delete(request)[-1])

    def set_order(self, order: Order) -> None:
        """Sort by another key from now on. Equal keys stay in order of arrival."""
        arrivals = [(request, key[-1]) for request, key in zip(self._requests, self._keys, strict=True)]
        self._order = order
        ordered = sorted((((*order(request), arrival), request) for request, arrival in arrivals), key=lambda e: e[0])
        self._keys, self._requests = [key for key, _ in ordered], [request for _, request in ordered]
        self._key_of = {request.id: key for key, request in ordered}
        self._table = None

    def position(self, request: Request) -> int:
        """Return how many requests are ahead of ``request``, which waits here."""
        return bisect_left(self._keys, self._key_of[request.id])

    def clear(self) -> None:
        """Remove all requests."""
        self._keys.clear()
        self._requests.clear()
        self._key_of.clear()
        self._table = None
        self.by_class.clear()
        self.by_tenant.clear()
        self.weights.clear()
        self._of.clear()

    def arrays(self, first: int | None = None) -> WaitingArrays:
        """Return the arrays of the ``first`` requests (None: all), valid until the next change."""
        if self._table is None:
            self._table = WaitingTable(self._requests)
        self._updates = 0
        return self._table.arrays(first)

    def _insert(self, request: Request, arrival: float) -> None:
        key = (*self._order(request), arrival)
        at = bisect_left(self._keys, key)
        self._keys.insert(at, key)
        self._requests.insert(at, request)
        self._key_of[request.id] = key
        if self._table is not None and self._count_update():
            self._table.insert(at, request)

    def _delete(self, request: Request) -> tuple[float, ...]:
        key = self._key_of.pop(request.id)
        at = bisect_left(self._keys, key)
        del self._keys[at], self._requests[at]
        if self._table is not None and self._count_update():
            self._table.delete(at)
        return key

    def _count_update(self) -> bool:
        """Return whether to update the table. After so many updates that rebuilding it is cheaper, it is dropped."""
        self._updates += 1
        if self._updates > max(_MAX_UPDATES, len(self._requests) // 16):
            self._table = None
            return False
        return True

    def __contains__(self, request: object) -> bool:
        return isinstance(request, Request) and request.id in self._key_of

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests)

    def __len__(self) -> int:
        return len(self._requests)

    @overload
    def __getitem__(self, index: int) -> Request: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Request]: ...
    def __getitem__(self, index: int | slice) -> Request | Sequence[Request]:
        return self._requests[index]


def arrays_of(requests: Sequence[Request], first: int | None) -> WaitingArrays:
    """Return the arrays of the ``first`` of ``requests`` (None: all); a `WaitingQueue` has them at hand."""
    if isinstance(requests, WaitingQueue):
        return requests.arrays(first)
    return WaitingArrays.of(requests[:first])


def tenant_weights(requests: Sequence[Request]) -> Mapping[str, float]:
    """Return the weight of each tenant of ``requests``; a `WaitingQueue` has them at hand."""
    if isinstance(requests, WaitingQueue):
        return requests.weights
    return {request.tenant: request.weight for request in requests}
