"""The requests that wait in front of one engine, kept in the order in which its policy wants to see them."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import overload

from gateway.requests.request import Request
from gateway.requests.waiting_arrays import WaitingArrays, WaitingTable

_CHANGES = 64
"""In a row, that are made in a table of any size."""

Order = Callable[[Request], tuple[float, ...]]
"""A request's sort key: the least comes first. Equal keys keep their order of arrival."""


class WaitingQueue(Sequence[Request]):
    """A sequence of requests sorted by ``order``; adding and removing one costs O(log n) comparisons.

    A key is read when its request is added, and so are its `arrays`: after a change that moves it, `reorder` it.
    """

    def __init__(self, order: Order) -> None:
        self._order = order
        self._keys: list[tuple[float, ...]] = []
        self._requests: list[Request] = []
        self._key_of: dict[str, tuple[float, ...]] = {}
        self._added = 0
        self._table: WaitingTable | None = None
        """Kept in step once somebody asked for `arrays`: most policies never do."""
        self._changed = 0
        """Rows put in or taken out since somebody asked."""
        self.by_class: Counter[str] = Counter()
        """How many wait, by SLO class."""

    def add(self, request: Request) -> None:
        """Put ``request`` in its place. Its id must not be waiting yet."""
        self._added += 1
        self._insert(request, self._added)
        self.by_class[request.slo_class] += 1

    def _insert(self, request: Request, arrival: float) -> None:
        key = (*self._order(request), arrival)
        at = bisect_left(self._keys, key)
        self._keys.insert(at, key)
        self._requests.insert(at, request)
        table = self._table_in_step()
        if table is not None:
            table.insert(at, request)
        self._key_of[request.id] = key

    def remove(self, request: Request) -> bool:
        """Take ``request`` out; False when it was not waiting."""
        if request.id not in self._key_of:
            return False
        self._take_out(request)
        self.by_class[request.slo_class] -= 1
        return True

    def _take_out(self, request: Request) -> tuple[float, ...]:
        key = self._key_of.pop(request.id)
        at = bisect_left(self._keys, key)
        del self._keys[at], self._requests[at]
        table = self._table_in_step()
        if table is not None:
            table.delete(at)
        return key

    def _table_in_step(self) -> WaitingTable | None:
        """The table, if the change at hand is to be made in it: after many in a row it is sooner made anew."""
        self._changed += 1
        if self._changed > max(_CHANGES, len(self._requests) // 16):
            self._table = None
        return self._table

    def reorder(self, request: Request) -> None:
        """``request`` changed in a way that may move it; among its equals it stands where it did."""
        if request.id in self._key_of:
            self._insert(request, self._take_out(request)[-1])

    def clear(self) -> None:
        """Take everything out."""
        self._keys.clear()
        self._requests.clear()
        self._key_of.clear()
        self._table = None
        self.by_class.clear()

    def arrays(self, first: int | None = None) -> WaitingArrays:
        """Of all that wait, or of the ``first`` so many, as they were when added. Good until the next change."""
        if self._table is None:
            self._table = WaitingTable(self._requests)
        self._changed = 0
        return self._table.arrays(first)

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


def arrays_of(requests: Sequence[Request], first: int | None = None) -> WaitingArrays:
    """The columns of the ``first`` so many (None: all) of any sequence: kept ones where it is a queue."""
    return requests.arrays(first) if isinstance(requests, WaitingQueue) else WaitingArrays.of(requests[:first])
