"""A request as policies and gates see it: its bounds, its sizes, how far it has come."""

from __future__ import annotations

import math
from dataclasses import dataclass

from gateway.slo import Slo

E2E_SHARE_FOR_TTFT = 0.25
"""An end-to-end bound alone leaves open how it is spent; this share of it is planned for the first token."""

BEST_EFFORT_STRETCH, BEST_EFFORT_PACE_S = 4.0, 1.0
"""A best-effort request is paced at this multiple of the TPOT bound it could not have, but at no less than so many
seconds a token: were its pace the strictest of the batch, the step gate would hold everyone else back for it."""


@dataclass(slots=True, eq=False)
class Request:
    """One request. Times are monotonic seconds, sizes are tokens.

    ``predicted_tokens`` is y_i of the paper, the predicted output length. ``generated`` counts output tokens of all
    its sequences; ``sequences`` how many it asked for.
    """

    id: str
    slo_class: str
    arrival_s: float
    slo: Slo
    prompt_tokens: int
    predicted_tokens: float
    predicted_p90: float = 0.0
    sequences: int = 1
    tenant: str = "anonymous"
    model: str = ""
    best_effort: bool = False
    admitted_s: float | None = None
    first_token_s: float | None = None
    generated: int = 0

    @property
    def ttft_slo_s(self) -> float:
        """T_i: the TTFT bound to plan with (s); infinite when nothing bounds the first token."""
        if self.best_effort:
            return math.inf
        explicit = self.slo.ttft_s if self.slo.ttft_s is not None else math.inf
        implied = self.slo.e2e_s * E2E_SHARE_FOR_TTFT if self.slo.e2e_s is not None else math.inf
        return min(explicit, implied)

    @property
    def tpot_slo_s(self) -> float | None:
        """P_i: the TPOT bound to plan with (s per token); None when nothing bounds it."""
        bound = self.slo.tpot_s
        if self.slo.e2e_s is not None:
            implied = self.slo.e2e_s * (1 - E2E_SHARE_FOR_TTFT) / max(1.0, self.predicted_tokens)
            bound = implied if bound is None else min(bound, implied)
        if bound is not None and self.best_effort:
            bound = max(bound * BEST_EFFORT_STRETCH, BEST_EFFORT_PACE_S)
        return bound

    @property
    def deadline_s(self) -> float:
        """d_i = a_i + T_i, the moment by which the first token is due (monotonic s)."""
        return self.arrival_s + self.ttft_slo_s

    @property
    def length(self) -> float:
        """Tokens of context per sequence: the prompt and what was generated so far."""
        return self.prompt_tokens + self.generated / self.sequences
