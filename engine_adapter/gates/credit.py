"""Credit-based batching (SCORPIO, section 3.4)."""

from __future__ import annotations

from collections.abc import Sequence

from engine_adapter.gates.base import Decoding, GatedRequest, StepPlan
from engine_adapter.step_report import StepReport

_WHOLE = 1.0 - 1e-9
"""A credit of at least this counts as 1: ten additions of 0.1 make 0.9999999999999999."""


class CreditGate:
    """With P_min the strictest pace among the decoding requests, each earns its TRP per step,

        TRP_i = P_min / P_i,    credit_i += TRP_i,    batched iff credit_i >= 1, then credit_i -= 1.

    So the strictest request decodes in every step, and the share of steps of any other converges to its TRP. A request
    without a pace decodes in every step. Credits start at 0, stay below 1 between steps, and follow changes of P_min.
    """

    def __init__(self) -> None:
        self._credit: dict[str, float] = {}

    def plan(
        self, now: float, decoding: Sequence[Decoding], prefill_backlog: int, yielding_prompts: bool = False
    ) -> StepPlan:
        """Add the step's credits and select the requests that sit out."""
        plan = StepPlan()
        strictest = min((r.pace_s for r in decoding if r.pace_s is not None), default=None)
        if strictest is None:
            return plan
        for request in decoding:
            if request.pace_s is None or request.pace_s <= strictest:
                continue
            credit = self._credit.get(request.request_id, 0.0) + strictest / request.pace_s
            if credit >= _WHOLE:
                credit -= 1.0
            else:
                plan.sit_out.add(request.request_id)
            self._credit[request.request_id] = credit
        return plan

    def preemptible(self, request: GatedRequest) -> bool:
        """Return False: the paper preempts no request."""
        return False

    def forget(self, request_id: str) -> None:
        """Drop the request's credit."""
        self._credit.pop(request_id, None)

    def observe(self, step: StepReport) -> None:
        """Do nothing: credits do not depend on step times."""
