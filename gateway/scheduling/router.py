"""Routing: choosing the engine for a request."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from gateway.requests.request import Request
from gateway.scheduling.engine_queue import EngineQueue
from gateway.scheduling.placement import load


class Router:
    """Holds one `EngineQueue` per engine; ``engine_queues`` must not be empty."""

    def __init__(self, engine_queues: Sequence[EngineQueue]) -> None:
        self.engine_queues = list(engine_queues)
        for engine_queue in self.engine_queues:
            engine_queue.another_engine_alive = partial(self._another_alive, engine_queue)

    def place(self, request: Request) -> EngineQueue:
        """Return the least loaded queue (`placement.load`); engines that are alive come first."""
        if len(self.engine_queues) == 1:
            return self.engine_queues[0]
        return min(self.engine_queues, key=lambda queue: (not queue.engine.state.alive, *load(queue.admission)))

    def _another_alive(self, engine_queue: EngineQueue) -> bool:
        return any(other.engine.state.alive for other in self.engine_queues if other is not engine_queue)

    @property
    def alive(self) -> bool:
        """Whether any engine can serve."""
        return any(engine_queue.engine.state.alive for engine_queue in self.engine_queues)

    def close(self) -> None:
        """Close every queue."""
        for engine_queue in self.engine_queues:
            engine_queue.close()
