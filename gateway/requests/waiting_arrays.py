"""The numbers of the waiting requests as arrays, in queue order.

A policy that looks at every waiting request in every decision would spend most of its time reading attributes, and the
values rarely change between decisions. So they are kept beside the queue, and a decision slices them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine_adapter.service_kind import ServiceKind
from gateway.requests.request import Request

Floats = NDArray[np.float64]

_PACED = ServiceKind.PACED

_INITIAL_CAPACITY = 64
"""Rows of a new table; the capacity doubles when it is full."""


class WaitingArrays(NamedTuple):
    """Read-only arrays of shape (n,), one value per waiting request. Infinity means "no bound" in a time.

    arrival, deadline: monotonic s; the deadline is the first token's.
    end: monotonic s, by which a paced request's end-to-end bound wants its last token.
    tpot_bound: s per token, the client's own TPOT bound.
    kind: a `ServiceKind`.
    prompt, uncached, output: tokens per sequence; what of the prompt must be computed; the predicted output.
    shared: tokens of the prompt that are in KV memory for a running request.
    tenant: `tenant_number`.
    """

    arrival: Floats
    deadline: Floats
    end: Floats
    tpot_bound: Floats
    kind: Floats
    sequences: Floats
    prompt: Floats
    uncached: Floats
    shared: Floats
    output: Floats
    tenant: Floats

    @classmethod
    def of(cls, requests: Sequence[Request]) -> WaitingArrays:
        """Return the arrays of ``requests``."""
        return WaitingTable(requests).arrays()

    def take(self, at: NDArray[np.intp]) -> WaitingArrays:
        """Return the rows with the numbers ``at``."""
        return WaitingArrays(*[array[at] for array in self])


def tenant_number(tenant: str) -> float:
    """Return a number that stands for ``tenant`` in arrays, in this process: 52 bits of its hash, to compare only."""
    return float(hash(tenant) & (1 << 52) - 1)


def _row(request: Request) -> tuple[float, ...]:
    slo, paced = request.slo, request.kind is _PACED
    return (
        request.arrival_s,
        request.deadline_s,
        request.arrival_s + slo.e2e_s if paced and slo.e2e_s is not None else math.inf,
        slo.tpot_s if slo.tpot_s is not None else math.inf,
        request.kind,
        request.sequences,
        request.prompt_tokens,
        request.uncached_tokens,
        request.shared_tokens,
        request.predicted_tokens,
        tenant_number(request.tenant),
    )


class WaitingTable:
    """`WaitingArrays` with insertion and deletion at any row. A request is read when it is inserted."""

    def __init__(self, requests: Sequence[Request]) -> None:
        rows = [_row(request) for request in requests]
        self._count = len(rows)
        self._allocate(max(_INITIAL_CAPACITY, 2 * len(rows)))
        if rows:
            self._values[:, : len(rows)] = np.array(rows, dtype=np.float64).T

    def _allocate(self, capacity: int) -> None:
        self._values = np.empty((len(WaitingArrays._fields), capacity), dtype=np.float64)
        self._read_only = self._values.view()
        self._read_only.flags.writeable = False

    def insert(self, at: int, request: Request) -> None:
        """Insert ``request`` before row ``at``."""
        count, before = self._count, self._values
        if count == before.shape[1]:
            self._allocate(2 * count)
            self._values[:, :count] = before
        values = self._values
        values[:, at + 1 : count + 1] = values[:, at:count]
        values[:, at] = _row(request)
        self._count = count + 1

    def delete(self, at: int) -> None:
        """Delete row ``at``."""
        values, count = self._values, self._count
        values[:, at : count - 1] = values[:, at + 1 : count]
        self._count = count - 1

    def arrays(self, first: int | None = None) -> WaitingArrays:
        """Return views of the ``first`` rows (None: all), valid until the next insertion or deletion."""
        count = self._count if first is None else min(first, self._count)
        return WaitingArrays(*self._read_only[:, :count])
