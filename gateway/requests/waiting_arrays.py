"""What policies reckon with of the requests that wait, as columns: one array each, in the order of the queue.

A policy that looks at every waiting request in every decision would spend most of its time on picking numbers out of
objects, and they are the same numbers as a moment ago. So they are kept in step with the queue, and looking is a slice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gateway.requests.request import Request

Floats = NDArray[np.float64]

_LEAST_ROOM = 64
"""Requests that a table has room for at first; it doubles."""


class WaitingArrays(NamedTuple):
    """Of n requests, each of shape (n,), not to be written to. Seconds and tokens; infinite is what nothing bounds.

    ``arrival`` and ``deadline`` (of the first token) are monotonic, and so is ``end``, by which an end-to-end bound
    wants the last one. ``tpot``: the pace to plan with, ``own_tpot``: the TPOT bound that was asked for. Nobody insists
    on the pace or the end of best effort, so these are infinite. ``prompt`` and predicted ``output`` are per sequence,
    as is ``predicted_at_arrival``: the output as it was predicted at arrival. ``length``: mean context over its
    life. ``variance``
    (tokens^2): see `Request`.
    """

    arrival: Floats
    deadline: Floats
    end: Floats
    tpot: Floats
    own_tpot: Floats
    sequences: Floats
    prompt: Floats
    output: Floats
    predicted_at_arrival: Floats
    length: Floats
    variance: Floats

    @classmethod
    def of(cls, requests: Sequence[Request]) -> WaitingArrays:
        """The columns of ``requests`` as they are now."""
        return WaitingTable(requests).arrays()


def _row(request: Request) -> tuple[float, ...]:
    """A request's place in each of the `WaitingArrays`."""
    slo, pace_s = request.slo, request.tpot_slo_s
    insists = pace_s is not None and not request.best_effort
    return (
        request.arrival_s,
        request.deadline_s,
        request.arrival_s + slo.e2e_s if insists and slo.e2e_s is not None else math.inf,
        pace_s if pace_s is not None and insists else math.inf,
        slo.tpot_s if slo.tpot_s is not None else math.inf,
        request.sequences,
        request.prompt_tokens,
        request.predicted_tokens,
        request.predicted_at_arrival,
        request.prompt_tokens + request.predicted_tokens / 2,
        request.variance,
    )


class WaitingTable:
    """`WaitingArrays` that grow and shrink at any place. A request's row is read when it is put in."""

    def __init__(self, requests: Sequence[Request] = ()) -> None:
        rows = [_row(request) for request in requests]
        self._count = len(rows)
        self._take_room(max(_LEAST_ROOM, 2 * len(rows)))
        if rows:
            self._kept[:, : len(rows)] = np.array(rows, dtype=np.float64).T

    def _take_room(self, capacity: int) -> None:
        self._kept = np.empty((len(WaitingArrays._fields), capacity), dtype=np.float64)
        self._shown = self._kept.view()
        self._shown.flags.writeable = False

    def insert(self, at: int, request: Request) -> None:
        """``request`` comes before the one that was number ``at``."""
        count, before = self._count, self._kept
        if count == before.shape[1]:
            self._take_room(2 * count)
            self._kept[:, :count] = before
        kept = self._kept
        kept[:, at + 1 : count + 1] = kept[:, at:count]
        kept[:, at] = _row(request)
        self._count = count + 1

    def delete(self, at: int) -> None:
        """Number ``at`` goes."""
        kept, count = self._kept, self._count
        kept[:, at : count - 1] = kept[:, at + 1 : count]
        self._count = count - 1

    def arrays(self, first: int | None = None) -> WaitingArrays:
        """Of all, or of the ``first`` so many. Views: good until the next insertion or deletion."""
        count = self._count if first is None else min(first, self._count)
        return WaitingArrays(*self._shown[:, :count])
