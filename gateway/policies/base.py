"""The interface of a scheduling policy: what it is shown and what it answers."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from engine_adapter.engine import EngineState
from gateway.requests.request import Request
from gateway.requests.slo import Bound

UNGATED = "open"
"""The step gate that changes nothing: stock vLLM."""

MAX_DECISION_INTERVAL_S = 0.1
"""Seconds between two decisions while requests wait, at most. Growing contexts and passing time matter that slowly."""


@dataclass(slots=True, frozen=True)
class Rejection:
    """Why a request cannot attain its SLO.

    Attributes:
        bound: the bound that fails.
        predicted_s: the value that is predicted for this bound, after the work ahead that the policy counts.
        attainable_s: a bound that would probably have been accepted; an estimate, and not the least one.
        retry_after_s: when asking again may succeed.
        infeasible: an idle engine would not meet the bound either, so the same request fails again.
    """

    request: Request
    bound: Bound
    predicted_s: float
    attainable_s: float
    retry_after_s: float
    infeasible: bool


def reject_ttft(
    request: Request, predicted_s: float, attainable_s: float, retry_after_s: float, infeasible: bool
) -> Rejection:
    """Reject for a first token that would come ``predicted_s`` after arrival.

    Where an end-to-end bound implied the deadline, the rejection names that bound and is in its terms.
    """
    if request.slo.ttft_s == request.ttft_slo_s:
        return Rejection(request, "ttft", predicted_s, attainable_s, retry_after_s, infeasible)
    predicted_s, attainable_s = request.e2e_for_ttft(predicted_s), request.e2e_for_ttft(attainable_s)
    return Rejection(request, "e2e", predicted_s, attainable_s, retry_after_s, infeasible)


def reject_tpot(request: Request, predicted_s: float, retry_after_s: float, infeasible: bool) -> Rejection:
    """Reject for tokens that would come ``predicted_s`` apart.

    Where an end-to-end bound implied the pace, the rejection names that bound and is in its terms.
    """
    if request.slo.tpot_s == request.pace_s:
        return Rejection(request, "tpot", predicted_s, predicted_s, retry_after_s, infeasible)
    e2e_s = request.e2e_for_tpot(predicted_s)
    return Rejection(request, "e2e", e2e_s, e2e_s, retry_after_s, infeasible)


@dataclass(slots=True)
class Decision:
    """Admit these requests, in order; reject those; the rest keeps waiting.

    Attributes:
        paces: new `Request.pace_s` of admitted requests, by request id, where the policy plans with another pace.
        yielding: ids of admitted requests that become `ServiceKind.YIELDING`.
        recheck_at: monotonic s; decide again then even if nothing happens (a deadline passes, for example).
        hold_s: least time (s) to the next decision while requests wait and the engine is busy; about a step.
        max_hold_s: limit (s) on the longer hold after a slow decision.
    """

    admit: list[Request] = field(default_factory=list)
    reject: list[Rejection] = field(default_factory=list)
    paces: dict[str, float] = field(default_factory=dict)
    yielding: set[str] = field(default_factory=set)
    recheck_at: float | None = None
    hold_s: float = 0.0
    max_hold_s: float = MAX_DECISION_INTERVAL_S / 2


class Policy(Protocol):
    """Decides for one engine. Time is an argument; a policy that reads a clock or does I/O is a bug."""

    @property
    def name(self) -> str:
        """The policy's name in configurations and metrics."""

    @property
    def gate(self) -> str:
        """The name (`engine_adapter.gates.composite.GATES`) of the step gate that admitted requests ask for.

        With `UNGATED` the engine receives no pace.
        """

    def order(self, request: Request) -> tuple[float, ...]:
        """Return the request's sort key in the queue, smallest first. Read when the request is queued."""

    def decide(
        self, now: float, waiting: Sequence[Request], running: Collection[Request], engine: EngineState
    ) -> Decision:
        """Decide at ``now`` (monotonic s). ``waiting`` is sorted by `order`, equal keys by arrival.

        `gateway.scheduling.decision_schedule` says when this is called.
        """


def prefill_seconds(requests: Iterable[Request], engine: EngineState) -> float:
    """Return the seconds of prefill work in ``requests``: the sum of t(p) of uncached tokens (SCORPIO eq. 6)."""
    prefill = engine.step_time.times.prefill
    return sum([prefill(r.uncached_tokens) for r in requests])


def prefill_backlog(running: Collection[Request], engine: EngineState) -> float:
    """Return the seconds of prefill work of admitted requests that have no first token yet."""
    return prefill_seconds([r for r in running if r.first_token_s is None and not r.unobserved], engine)


@dataclass(slots=True)
class PrefillLookahead:
    """Bounds the uncached prompt tokens that wait inside the engine, because order is decided in the gateway.

    ``tokens`` are there now, ``limit`` may be. A prompt longer than the limit enters when no other one is there.
    The limit is in steps, and the engine may plan some (`EngineState.reaction_steps`) before the next prompt enters.
    """

    tokens: int
    limit: float

    @classmethod
    def of(cls, running: Collection[Request], engine: EngineState, steps: float) -> PrefillLookahead:
        """Return a lookahead of ``steps`` full steps of ``engine``, which has admitted ``running``."""
        tokens = sum([r.uncached_tokens for r in running if r.first_token_s is None and not r.unobserved])
        return cls(tokens, (steps + engine.reaction_steps) * engine.max_num_batched_tokens)

    @property
    def left(self) -> float:
        """Remaining lookahead tokens; infinite while no prompt waits in the engine."""
        return self.limit - self.tokens if self.tokens else math.inf

    def fits(self, request: Request) -> bool:
        """Whether the request's prompt may enter now."""
        return request.uncached_tokens <= self.left

    def add(self, request: Request) -> None:
        """Count an admitted request's prompt."""
        self.tokens += request.uncached_tokens
