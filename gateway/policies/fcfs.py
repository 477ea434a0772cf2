"""First come, first served: stock vLLM. Everything is passed on at once; the engine's own queue orders it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from engine_adapter.engine import EngineState
from gateway.policies.base import UNGATED, Decision
from gateway.requests.request import Request


@dataclass(slots=True)
class Fcfs:
    """Admits all, in order of arrival; rejects none; gates nothing."""

    name: str = "fcfs"
    gate: str = UNGATED

    def order(self, request: Request) -> tuple[float, ...]:
        """By arrival."""
        return (request.arrival_s,)

    def decide(
        self, now: float, waiting: Sequence[Request], running: Collection[Request], engine: EngineState
    ) -> Decision:
        """Admit everything that waits."""
        return Decision(admit=list(waiting))
