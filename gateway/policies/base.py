"""What a policy is, what it sees, and what it may answer."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Protocol

from engine_adapter.engine import EngineState
from gateway.request import Request
from gateway.slo import Bound


@dataclass(slots=True, frozen=True)
class Rejection:
    """Why a request cannot attain its SLO.

    ``bound`` is the bound that fails, ``predicted_s`` what it would be if served now, ``attainable_s`` the least bound
    that would have been accepted, ``retry_after_s`` when asking again may succeed. ``hopeless``: not even an idle
    engine would meet it, so that asking again as it is cannot help.
    """

    request: Request
    bound: Bound
    predicted_s: float
    attainable_s: float
    retry_after_s: float
    hopeless: bool = False


@dataclass(slots=True)
class Decision:
    """Admit these, in order; reject those; keep the rest. ``recheck_at`` (monotonic s): decide again by then."""

    admit: list[Request] = field(default_factory=list)
    reject: list[Rejection] = field(default_factory=list)
    recheck_at: float | None = None


class Policy(Protocol):
    """Decides for one engine. Time is an argument; a policy that reads a clock or touches a socket is a bug."""

    @property
    def name(self) -> str:
        """What the policy is called in configurations and metrics."""

    @property
    def gated(self) -> bool:
        """Whether admitted requests carry their TPOT bound into the engine's step gate."""

    def decide(
        self, now: float, waiting: Collection[Request], running: Collection[Request], engine: EngineState
    ) -> Decision:
        """Decide at ``now`` (monotonic s). ``waiting`` comes in no particular order."""


def prefill_backlog(running: Collection[Request], engine: EngineState) -> float:
    """Seconds of prefill work that was admitted but has not produced its first token yet."""
    return sum(engine.step_time.prefill(r.prompt_tokens) for r in running if r.first_token_s is None)
