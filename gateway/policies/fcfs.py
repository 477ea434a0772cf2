"""First come, first served: the baseline that behaves like stock vLLM.

Every request goes to the engine at once, and the engine's own queue orders them.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from engine_adapter.engine import EngineState
from gateway.policies.base import UNGATED, Decision
from gateway.requests.request import Request


@dataclass(slots=True)
class Fcfs:
    """Admits every request in arrival order; rejects none; uses no step gate."""

    name: str = "fcfs"
    gate: str = UNGATED

    def order(self, request: Request) -> tuple[float, ...]:
        """Sort by arrival."""
        return (request.arrival_s,)

    def decide(
        self, now: float, waiting: Sequence[Request], running: Collection[Request], engine: EngineState
    ) -> Decision:
        """Admit all waiting requests."""
        return Decision(admit=list(waiting))
