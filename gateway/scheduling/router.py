"""Placement: which engine's lane a request waits in. What happens there is the lane's own business."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial

from gateway.requests.request import Request
from gateway.scheduling.engine_queue import Lane, Verdict
from gateway.scheduling.placement import load as ahead


class Dispatcher:
    """Holds one lane per engine; one is the common case. ``lanes`` must not be empty."""

    def __init__(self, lanes: Sequence[Lane]) -> None:
        self.lanes = list(lanes)
        for lane in self.lanes:
            lane.another_lives = partial(self._lives_beside, lane)

    def submit(self, request: Request) -> tuple[Lane, asyncio.Future[Verdict]]:
        """Place ``request`` and queue it; answers the lane and what it will decide."""
        lane = self.place(request)
        return lane, lane.submit(request)

    def place(self, request: Request) -> Lane:
        """The lane with the most headroom, as its policy counts it (`multi_instance.load`); living engines first."""
        if len(self.lanes) == 1:
            return self.lanes[0]

        def load(lane: Lane) -> tuple[bool, float, int]:
            return (not lane.engine.state.alive, *ahead(lane.admission))

        return min(self.lanes, key=load)

    def _lives_beside(self, lane: Lane) -> bool:
        return any(other.engine.state.alive for other in self.lanes if other is not lane)

    @property
    def alive(self) -> bool:
        """Whether any engine can serve."""
        return any(lane.engine.state.alive for lane in self.lanes)

    def close(self) -> None:
        """Stop every lane's timer."""
        for lane in self.lanes:
            lane.close()
