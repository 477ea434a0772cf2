"""Step gates: who decodes in the next engine step, and how many prefill tokens ride along.

Pure: no clock, no I/O, no engine. The same objects run inside vLLM (`engine_adapter.vllm.scheduler`), in the simulated
engine and in tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol


class Paced(Protocol):
    """A request in the engine, and the pace that it has to keep."""

    @property
    def request_id(self) -> str:
        """Unique among the running requests."""

    @property
    def tpot_slo_s(self) -> float | None:
        """Bound on seconds per output token, P_i; None when the request carries none."""

    @property
    def gate(self) -> str:
        """The gate that paces it, by its name in `gates.GATES`; "" for the engine's own choice."""


class Decoding(Paced, Protocol):
    """A running request past its prefill, as a gate sees it."""

    @property
    def length(self) -> int:
        """Tokens of context: the prompt and what was generated, tokens on their way included."""


@dataclass(slots=True)
class StepPlan:
    """One step's decision: the ids that do not decode, and the cap on prefill tokens (None: the engine's own)."""

    sit_out: set[str] = field(default_factory=set)
    max_prefill_tokens: int | None = None


class StepGate(Protocol):
    """Plans one engine step. Called once before each step; may keep state per request id."""

    def plan(self, now: float, decoding: Sequence[Decoding], prefill_backlog: int) -> StepPlan:
        """Decide the step that starts at ``now`` (s), given who decodes and the prompt tokens still to prefill."""

    def preemptible(self, request: Paced) -> bool:
        """Whether the request gives its place in a full engine to one that has a pace to keep (`make_way`)."""

    def forget(self, request_id: str) -> None:
        """The request left the running set for good; drop what was kept for it."""

    def observe(self, decode_requests: int, prefill_tokens: int, mean_context: float, elapsed_s: float) -> None:
        """A step took ``elapsed_s`` seconds; arguments as in `StepTimeModel.observe`."""


class OpenGate:
    """Stock behaviour: everyone decodes, the engine's own token budget applies."""

    def plan(self, now: float, decoding: Sequence[Decoding], prefill_backlog: int) -> StepPlan:
        """Let everyone through."""
        return StepPlan()

    def preemptible(self, request: Paced) -> bool:
        """Nobody does."""
        return False

    def forget(self, request_id: str) -> None:
        """Nothing is kept."""

    def observe(self, decode_requests: int, prefill_tokens: int, mean_context: float, elapsed_s: float) -> None:
        """Step times do not matter here."""


_WHOLE = 1.0 - 1e-9
"""A credit this close to 1 counts as whole: ten additions of 0.1 make 0.9999999999999999."""


class CreditGate:
    """Credit-based batching, SCORPIO section 3.4.

    With P_min the strictest TPOT bound among the decoding requests, each earns its TRP per step,

        TRP_i = P_min / P_i,    credit_i += TRP_i,    batched iff credit_i >= 1, then credit_i -= 1,

    so the strictest decode in every step and a request's share of steps converges to its TRP. A request without a
    bound is not gated. Credits start at 0, never exceed 1 between steps, and follow TRP as P_min changes.
    """

    def __init__(self) -> None:
        self._credit: dict[str, float] = {}

    def plan(self, now: float, decoding: Sequence[Decoding], prefill_backlog: int) -> StepPlan:
        """Earn, select, debit."""
        plan = StepPlan()
        strictest = min((r.tpot_slo_s for r in decoding if r.tpot_slo_s is not None), default=None)
        if strictest is None:
            return plan
        for request in decoding:
            if request.tpot_slo_s is None or request.tpot_slo_s <= strictest:
                continue
            credit = self._credit.get(request.request_id, 0.0) + strictest / request.tpot_slo_s
            if credit >= _WHOLE:
                credit -= 1.0
            else:
                plan.sit_out.add(request.request_id)
            self._credit[request.request_id] = credit
        return plan

    def preemptible(self, request: Paced) -> bool:
        """Nobody does."""
        return False

    def forget(self, request_id: str) -> None:
        """Drop the request's credit."""
        self._credit.pop(request_id, None)

    def observe(self, decode_requests: int, prefill_tokens: int, mean_context: float, elapsed_s: float) -> None:
        """Step times do not matter here."""
