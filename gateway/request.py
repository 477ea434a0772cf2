"""A request as policies and gates see it: its bounds, its sizes, how far it has come."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from gateway.slo import Slo

E2E_SHARE_FOR_TTFT = 0.25
"""An end-to-end bound alone leaves open how it is spent; this share of it is planned for the first token."""

BEST_EFFORT_STRETCH, BEST_EFFORT_PACE_S = 4.0, 1.0
"""A best-effort request is paced at this multiple of the TPOT bound it could not have, but at no less than so many
seconds a token: were its pace the strictest of the batch, the step gate would hold everyone else back for it."""


@dataclass(slots=True, eq=False)
class Request:
    """One request. Times are monotonic seconds, sizes are tokens.

    ``predicted_tokens`` is y_i of the paper, the predicted output length, ``predicted_p90`` its 90th percentile (0:
    not known). ``generated`` counts output tokens of all its sequences; ``sequences`` how many it asked for.

    The bounds to plan with follow from these and are kept at hand, because policies read them for every request at
    every decision: ``ttft_slo_s`` is T_i (infinite when nothing bounds the first token), ``deadline_s`` is
    d_i = a_i + T_i, ``tpot_slo_s`` is P_i in seconds per token (None when nothing bounds it).
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
    ttft_slo_s: float = field(init=False)
    tpot_slo_s: float | None = field(init=False)
    deadline_s: float = field(init=False)

    def __post_init__(self) -> None:
        self._plan()

    def predict(self, tokens: float, p90: float) -> None:
        """Take a new prediction of the output length (tokens)."""
        self.predicted_tokens, self.predicted_p90 = tokens, p90
        self._plan()

    def serve_at_best_effort(self) -> None:
        """Its SLO cannot be attained; it is served all the same, at nobody's cost."""
        self.best_effort = True
        self._plan()

    @property
    def length(self) -> float:
        """Tokens of context per sequence: the prompt and what was generated so far."""
        return self.prompt_tokens + self.generated / self.sequences

    def _plan(self) -> None:
        slo = self.slo
        ttft = math.inf if slo.ttft_s is None else slo.ttft_s
        tpot = slo.tpot_s
        if slo.e2e_s is not None:
            ttft = min(ttft, slo.e2e_s * E2E_SHARE_FOR_TTFT)
            implied = slo.e2e_s * (1 - E2E_SHARE_FOR_TTFT) / max(1.0, self.predicted_tokens)
            tpot = implied if tpot is None else min(tpot, implied)
        if self.best_effort:
            ttft = math.inf
            tpot = None if tpot is None else max(tpot * BEST_EFFORT_STRETCH, BEST_EFFORT_PACE_S)
        self.ttft_slo_s, self.tpot_slo_s, self.deadline_s = ttft, tpot, self.arrival_s + ttft
