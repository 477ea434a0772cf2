"""What a policy is, what it sees, and what it may answer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from engine_adapter.engine import EngineState
from gateway.requests.request import Request
from gateway.requests.slo import Bound

UNGATED = "open"
"""The gate that lets everyone through: stock vLLM."""


@dataclass(slots=True, frozen=True)
class Rejection:
    """Why a request cannot attain its SLO.

    ``bound`` is the bound that fails, ``predicted_s`` what it would be if served now, ``attainable_s`` the least bound
    that would have been accepted, ``retry_after_s`` when asking again may succeed. ``infeasible``: not even an idle
    engine would meet it, so that asking again as it is cannot help.
    """

    request: Request
    bound: Bound
    predicted_s: float
    attainable_s: float
    retry_after_s: float
    infeasible: bool = False


def reject_ttft(
    request: Request, predicted_s: float, attainable_s: float, retry_after_s: float, infeasible: bool
) -> Rejection:
    """``request`` would get its first token ``predicted_s`` after it came in.

    An end-to-end bound is answered in its own terms: the TTFT is planned to be a share of it.
    """
    if request.slo.ttft_s == request.ttft_slo_s:
        return Rejection(request, "ttft", predicted_s, attainable_s, retry_after_s, infeasible)
    predicted_s, attainable_s = request.e2e_for_ttft(predicted_s), request.e2e_for_ttft(attainable_s)
    return Rejection(request, "e2e", predicted_s, attainable_s, retry_after_s, infeasible)


def reject_tpot(request: Request, predicted_s: float, retry_after_s: float, infeasible: bool) -> Rejection:
    """``request`` would get its tokens ``predicted_s`` apart.

    An end-to-end bound is answered in its own terms: y tokens of this TPOT are planned to be a share of it.
    """
    if request.slo.tpot_s == request.tpot_slo_s:
        return Rejection(request, "tpot", predicted_s, predicted_s, retry_after_s, infeasible)
    e2e_s = request.e2e_for_tpot(predicted_s)
    return Rejection(request, "e2e", e2e_s, e2e_s, retry_after_s, infeasible)


LOOK_AGAIN_S = 0.1
"""Seconds. What a step alone changes, contexts that grow and time that passes, can wait so long for a decision."""


@dataclass(slots=True)
class Decision:
    """Admit these, in order; reject those; keep the rest. ``recheck_at`` (monotonic s): decide again by then, but for
    ``stands_s``.

    ``fits``: whether a newcomer could go before an answer begins or ends. One that could not need not be looked at
    sooner.

    ``stands_s``: for so long all news can wait, while others wait and the engine is busy: it has what it needs. For
    ``lasts_s`` it may, where deciding takes long: that costs something.

    ``paces``: by the id of an admitted request, the seconds per token to plan with from now on, where that is not what
    its ``tpot_slo_s`` says.
    """

    admit: list[Request] = field(default_factory=list)
    reject: list[Rejection] = field(default_factory=list)
    recheck_at: float | None = None
    paces: dict[str, float] = field(default_factory=dict)
    fits: Callable[[Request], bool] = field(default=lambda request: True, compare=False)
    stands_s: float = 0.0
    lasts_s: float = LOOK_AGAIN_S / 2


class Policy(Protocol):
    """Decides for one engine. Time is an argument; a policy that reads a clock or touches a socket is a bug."""

    @property
    def name(self) -> str:
        """What the policy is called in configurations and metrics."""

    @property
    def gate(self) -> str:
        """The step gate that paces admitted requests inside the engine, by its name in
        `engine_adapter.gates.composite.GATES`.

        `UNGATED`: none; their TPOT bounds stay at the gateway.
        """

    def order(self, request: Request) -> tuple[float, ...]:
        """Where ``request`` stands among those that wait: the least comes first. Read when it comes in."""

    def decide(
        self, now: float, waiting: Sequence[Request], running: Collection[Request], engine: EngineState
    ) -> Decision:
        """Decide at ``now`` (monotonic s). ``waiting`` is sorted by `order`, equals by arrival.

        Asked when a request comes that `Decision.fits`, or begins its answer, or leaves, and while any wait within
        `LOOK_AGAIN_S`; not on every step, and while others wait not before the latest decision has stood for its time
        (`Decision.stands_s`).
        """


def prefill_seconds(requests: Iterable[Request], engine: EngineState) -> float:
    """Seconds of prefill work in ``requests``: the sum of t(p) (SCORPIO eq. 6)."""
    prefill = engine.step_time.prefill
    return sum(prefill(r.prompt_tokens) for r in requests)


def prefill_backlog(running: Collection[Request], engine: EngineState) -> float:
    """Seconds of prefill work that was admitted but has not produced its first token yet."""
    return prefill_seconds([r for r in running if r.prefilling], engine)


@dataclass(slots=True)
class PrefillLookahead:
    """Room for prompts in the engine. Order is kept at the gateway, so the engine's own queue stays short.

    ``tokens`` prompt tokens lie in the engine unprefilled, ``limit`` may; a prompt longer than that goes when nothing
    else does.
    """

    tokens: int
    limit: float

    @classmethod
    def of(cls, running: Collection[Request], limit: float) -> PrefillLookahead:
        """What is left of ``limit`` prompt tokens."""
        return cls(sum([r.prompt_tokens for r in running if r.first_token_s is None and not r.unobserved]), limit)

    def fits(self, request: Request, its_turn: bool = False) -> bool:
        """Whether the request's prompt may go now; when it is its turn, unless there are too many already."""
        if its_turn and self.tokens <= self.limit:
            return True
        return not self.tokens or self.tokens + request.prompt_tokens <= self.limit

    def add(self, request: Request) -> None:
        """The request goes."""
        self.tokens += request.prompt_tokens
