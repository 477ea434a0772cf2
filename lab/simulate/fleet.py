"""Simulated engines behind the router of one gateway, or of several that divide the engines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from engine_adapter.engine import ASGIApp, EngineEvents, EngineState, RenderedPrompt
from engine_adapter.model_card import ModelCard
from gateway.requests.request import Request
from gateway.scheduling.engine_queue import EngineQueue
from gateway.scheduling.router import Router
from gateway.scheduling.routing import make_routing
from gateway.scheduling.shards import owners
from lab.simulate.replica import Replica

MODEL = "simulated"
"""Name of the model that every replica serves, whatever its profile."""


class _ReplicaEngine:
    """A `Replica` as the router sees an engine: a name and a state. It has no app, because no HTTP request arrives."""

    takes_xargs = watches_disconnect = False

    def __init__(self, name: str, state: EngineState) -> None:
        self.name, self.state = name, state

    @property
    def app(self) -> ASGIApp:
        """Raises: a simulated replica serves no HTTP requests."""
        raise NotImplementedError("a simulated replica serves no HTTP requests")

    async def start(self, events: EngineEvents) -> None:
        """Do nothing."""

    async def stop(self) -> None:
        """Do nothing."""

    async def render(self, path: str, document: dict[str, Any]) -> RenderedPrompt | None:
        """Return None."""
        return None

    async def count_tokens(self, document: dict[str, Any]) -> int | None:
        """Return None."""
        return None

    def unsupported_reason(self, body: dict[str, Any]) -> str | None:
        """Return None."""
        return None

    async def probe(self) -> None:
        """Do nothing."""


class Fleet:
    """Replicas behind a `Router`, as engines are in the gateway. ``clock`` returns virtual time (s).

    ``names``: of the engines, by default their numbers.
    """

    def __init__(
        self,
        replicas: Sequence[Replica],
        routing: str,
        clock: Callable[[], float],
        names: Sequence[str] | None = None,
    ) -> None:
        self._replicas: dict[EngineQueue, Replica] = {}
        for name, replica in zip(names or map(str, range(len(replicas))), replicas, strict=True):
            replica.state.set_models([ModelCard(MODEL)])
            queue = EngineQueue(_ReplicaEngine(name, replica.state), replica.admission.policy, {}, clock=clock)
            replica.admission.phase = queue.admission.phase
            queue.admission = replica.admission
            self._replicas[queue] = replica
        self._router = Router(list(self._replicas), make_routing(routing), clock)

    def place(self, request: Request) -> Replica:
        """Return the replica that the router sends ``request`` to."""
        queue = self._router.place(request)
        self._router.on_sent(queue, request)
        return self._replicas[queue]


class ShardedFleet:
    """Replicas of which each of several gateways has a share, as with `shard` in their configuration.

    A request goes to a random gateway, as behind a load balancer that knows nothing of the gateways.

    Args:
        replicas: the engines, at least as many as ``gateways``.
        routing, clock: of every gateway, as in `Fleet`.
        gateways: number of gateways.
        requests: number of requests; their ids are from 0.
        seed: decides which gateway gets which request.
    """

    def __init__(
        self,
        replicas: Sequence[Replica],
        routing: str,
        clock: Callable[[], float],
        gateways: int,
        requests: int,
        seed: int,
    ) -> None:
        if gateways > len(replicas):
            raise ValueError(f"{gateways} gateways cannot divide {len(replicas)} engines: each needs at least one")
        shards = owners(map(str, range(len(replicas))), gateways)
        self._fleets: list[Fleet] = []
        for shard in range(gateways):
            numbers = [number for number in range(len(replicas)) if shards[str(number)] == shard]
            names = [str(number) for number in numbers]
            self._fleets.append(Fleet([replicas[number] for number in numbers], routing, clock, names))
        # NOTE: a stream of its own, so that the workload is the same for any number of gateways.
        self._gateway_of: list[int] = np.random.default_rng([seed, 0x54A2D]).integers(gateways, size=requests).tolist()

    def place(self, request: Request) -> Replica:
        """Return the replica that the gateway of ``request`` sends it to."""
        return self._fleets[self._gateway_of[int(request.id)]].place(request)
