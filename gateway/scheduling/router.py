"""Placement: which engine's lane a request waits in. What happens there is the lane's own business."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial

from gateway.requests.request import Request
from gateway.scheduling.engine_queue import EngineQueue, QueueOutcome
from gateway.scheduling.placement import load as ahead


class Router:
    """Holds one lane per engine; one is the common case. ``engine_queues`` must not be empty."""

    def __init__(self, engine_queues: Sequence[EngineQueue]) -> None:
        self.engine_queues = list(engine_queues)
        for engine_queue in self.engine_queues:
            engine_queue.another_engine_alive = partial(self._another_alive, engine_queue)

    def submit(self, request: Request) -> tuple[EngineQueue, asyncio.Future[QueueOutcome]]:
        """Place ``request`` and queue it; answers the lane and what it will decide."""
        engine_queue = self.place(request)
        return engine_queue, engine_queue.submit(request)

    def place(self, request: Request) -> EngineQueue:
        """The lane with the most headroom, as its policy counts it (`multi_instance.load`); living engines first."""
        if len(self.engine_queues) == 1:
            return self.engine_queues[0]

        def load(engine_queue: EngineQueue) -> tuple[bool, float, int]:
            return (not engine_queue.engine.state.alive, *ahead(engine_queue.admission))

        return min(self.engine_queues, key=load)

    def _another_alive(self, engine_queue: EngineQueue) -> bool:
        return any(other.engine.state.alive for other in self.engine_queues if other is not engine_queue)

    @property
    def alive(self) -> bool:
        """Whether any engine can serve."""
        return any(engine_queue.engine.state.alive for engine_queue in self.engine_queues)

    def close(self) -> None:
        """Stop every lane's timer."""
        for engine_queue in self.engine_queues:
            engine_queue.close()
