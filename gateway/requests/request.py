"""A request as policies and gates see it: its bounds, its sizes, how far it has come."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from statistics import NormalDist

from gateway.requests.length_survival import surviving_quantile
from gateway.requests.slo import Slo

E2E_PACE_S = 0.03
"""An end-to-end bound alone leaves open how it is spent. Its tokens are planned at so many seconds each, and what that
leaves of it goes to the first one: the longer the predicted answer, the earlier it must begin."""

E2E_LEAST_FOR_TTFT, E2E_MOST_FOR_TTFT = 0.05, 0.5
"""Shares of the bound that the first token's part stays between: no answer begins at once, nor waits and then races."""

BEST_EFFORT_STRETCH, BEST_EFFORT_PACE_S = 4.0, 1.0
"""A best-effort request is paced at this multiple of the TPOT bound it could not have, but at no less than so many
seconds a token: were its pace the strictest of the batch, the step gate would hold everyone else back for it."""

_Z90 = NormalDist().inv_cdf(0.9)


@dataclass(slots=True, eq=False)
class Request:
    """One request. Times are monotonic seconds, sizes are tokens.

    ``predicted_tokens`` is y_i of the paper, the predicted output length, ``predicted_p90`` its 90th percentile (0:
    not known), both per sequence and never above ``max_tokens``. They are what is expected *now*: once a request has
    outlived its predicted length, they are those of the answers that do (`advance`). ``predicted_at_arrival`` stays as
    it was. ``generated`` counts output tokens of all its sequences; ``sequences`` how many it asked for.
    ``unobserved``:
    the engine says nothing of its tokens before all are there.

    The bounds to plan with follow from these and are kept at hand, because policies read them for every request at
    every decision: ``ttft_slo_s`` is T_i (infinite when nothing bounds the first token), ``deadline_s`` is
    d_i = a_i + T_i, ``tpot_slo_s`` is P_i in seconds per token (None when nothing bounds it). So is ``variance``
    (tokens^2): by how much the lengths of its sequences together are uncertain, were they normal.
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
    max_tokens: float = math.inf
    best_effort: bool = False
    admitted_s: float | None = None
    first_token_s: float | None = None
    unobserved: bool = False
    generated: int = 0
    ttft_slo_s: float = field(init=False)
    tpot_slo_s: float | None = field(init=False)
    deadline_s: float = field(init=False)
    predicted_at_arrival: float = field(init=False)
    variance: float = field(init=False)
    _p90_at_arrival: float = field(init=False)
    _revise_at: float = field(init=False)

    def __post_init__(self) -> None:
        self.predict(self.predicted_tokens, self.predicted_p90)

    @property
    def prefilling(self) -> bool:
        """Whether it is to be expected, of one that was admitted, that its prompt is not prefilled yet."""
        return self.first_token_s is None and not self.unobserved

    def predict(self, tokens: float, p90: float) -> None:
        """Take the prediction of the output length (tokens), as of before its first token."""
        self.predicted_tokens, self.predicted_p90 = tokens, p90
        self.predicted_at_arrival, self._p90_at_arrival = tokens, p90
        self._revise_at = tokens * self.sequences
        self._spread()
        self._plan()

    def advance(self, tokens: int) -> None:
        """So many more output tokens are out.

        A request that reaches its predicted length L without ending is expected to become as long as half of those that
        do, Q(1/2 | L > g) (`gateway.requests.length_survival`), and is looked at again half way there. So this is
        one comparison a
        token, and a handful of revisions in a long answer. The pace that an end-to-end bound implies stays as it was
        when the request was let in: the engine was told, and paces by it.
        """
        self.generated += tokens
        if self.generated >= self._revise_at:
            self._outlived()

    def _outlived(self) -> None:
        each = self.generated / self.sequences
        p50, p90, most = self.predicted_at_arrival, self._p90_at_arrival, self.max_tokens
        self.predicted_tokens = min(surviving_quantile(0.5, each, p50, p90), most)
        self.predicted_p90 = max(min(surviving_quantile(0.9, each, p50, p90), most), self.predicted_tokens)
        ahead = max((self.predicted_tokens - each) / 2, 1.0)
        self._revise_at = (each + ahead) * self.sequences
        self._spread()

    def _spread(self) -> None:
        deviation = max(self.predicted_p90 - self.predicted_tokens, 0.0) / _Z90
        self.variance = self.sequences * (deviation * deviation)

    def pace_after(self, first_token_s: float, ease: float = 1.0) -> float:
        """P_i (s, infinite where nothing bounds it) were its first token to come at ``first_token_s`` (monotonic).

        What is left of an end-to-end bound then is for the other tokens: ``ease`` * (a_i + E_i - first) / y_i.
        """
        if self.tpot_slo_s is None or self.best_effort:
            return math.inf
        if self.slo.e2e_s is None:
            return self.tpot_slo_s
        left = ease * max(self.arrival_s + self.slo.e2e_s - first_token_s, 0.0) / max(1.0, self.predicted_at_arrival)
        return left if self.slo.tpot_s is None else min(left, self.slo.tpot_s)

    def wait_again(self) -> None:
        """The engine that it was let in to never took it."""
        self.admitted_s, self.unobserved = None, False
        self._plan()

    def serve_at_best_effort(self) -> None:
        """Its SLO cannot be attained; it is served all the same, at nobody's cost."""
        self.best_effort = True
        self._plan()

    @property
    def length(self) -> float:
        """Tokens of context per sequence: the prompt and what was generated so far."""
        return self.prompt_tokens + self.generated / self.sequences

    @property
    def e2e_share_for_ttft(self) -> float:
        """The share of the end-to-end bound that is planned for the first token; 0 without one."""
        if self.slo.e2e_s is None:
            return 0.0
        left = 1 - max(1.0, self.predicted_at_arrival) * E2E_PACE_S / self.slo.e2e_s
        return min(max(left, E2E_LEAST_FOR_TTFT), E2E_MOST_FOR_TTFT)

    def e2e_for_ttft(self, ttft_s: float) -> float:
        """The least end-to-end bound (s) of which ``ttft_s`` would be planned for the first token."""
        tail = max(1.0, self.predicted_at_arrival) * E2E_PACE_S
        return max(ttft_s / E2E_MOST_FOR_TTFT, min(ttft_s + tail, ttft_s / E2E_LEAST_FOR_TTFT))

    def e2e_for_tpot(self, tpot_s: float) -> float:
        """An end-to-end bound (s) that leaves room for a pace of ``tpot_s``, and as much again for the first token."""
        return tpot_s * max(1.0, self.predicted_at_arrival) / (1 - E2E_MOST_FOR_TTFT)

    def _plan(self) -> None:
        slo = self.slo
        ttft = math.inf if slo.ttft_s is None else slo.ttft_s
        tpot = slo.tpot_s
        if slo.e2e_s is not None:
            share = self.e2e_share_for_ttft
            ttft = min(ttft, slo.e2e_s * share)
            implied = slo.e2e_s * (1 - share) / max(1.0, self.predicted_tokens)
            tpot = implied if tpot is None else min(tpot, implied)
        if self.best_effort:
            ttft = math.inf
            tpot = None if tpot is None else max(tpot * BEST_EFFORT_STRETCH, BEST_EFFORT_PACE_S)
        self.ttft_slo_s, self.tpot_slo_s, self.deadline_s = ttft, tpot, self.arrival_s + ttft
