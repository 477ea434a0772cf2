"""Simulated engines behind the gateway's router."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from engine_adapter.engine import ASGIApp, EngineEvents, EngineState, RenderedPrompt
from engine_adapter.model_card import ModelCard
from gateway.requests.request import Request
from gateway.scheduling.engine_queue import EngineQueue
from gateway.scheduling.router import Router
from gateway.scheduling.routing import make_routing
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
    """Replicas behind a `Router`, as engines are in the gateway. ``clock`` returns virtual time (s)."""

    def __init__(self, replicas: Sequence[Replica], routing: str, clock: Callable[[], float]) -> None:
        self._replicas: dict[EngineQueue, Replica] = {}
        for number, replica in enumerate(replicas):
            replica.state.set_models([ModelCard(MODEL)])
            queue = EngineQueue(_ReplicaEngine(str(number), replica.state), replica.admission.policy, {}, clock=clock)
            queue.admission = replica.admission
            self._replicas[queue] = replica
        self._router = Router(list(self._replicas), make_routing(routing), clock)

    def place(self, request: Request) -> Replica:
        """Return the replica that the router sends ``request`` to."""
        queue = self._router.place(request)
        self._router.on_sent(queue, request)
        return self._replicas[queue]
