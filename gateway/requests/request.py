"""A request as policies and gates see it: its bounds, its sizes, and its progress."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from engine_adapter.service_kind import ServiceKind
from gateway.requests.length_survival import surviving_quantile
from gateway.requests.slo import Slo

# Looking a member up in its class costs more than comparing it.
_PACED, _DEADLINE_ONLY, _BEST_EFFORT = ServiceKind.PACED, ServiceKind.DEADLINE_ONLY, ServiceKind.BEST_EFFORT

E2E_PACE_S = 0.03
"""Seconds per output token with which an end-to-end bound is split.

The tokens get this much each and the first token gets the rest, so a longer predicted response must start earlier.
0.03 is the strictest TPOT bound of SCORPIO's table."""

E2E_LEAST_FOR_TTFT, E2E_MOST_FOR_TTFT = 0.05, 0.5
"""Limits on the share of an end-to-end bound that is planned for the first token."""

BEST_EFFORT_PACE_S = 1.0
"""Seconds per token of a request whose TPOT bound is waived. A gate that paces everything (SCORPIO's credits) then
lets it decode in few steps, so that it does not slow requests that have a pace to keep."""

LEAST_AHEAD = 1 / 16
"""Least part of its length by which a response grows between two revisions of its predicted length.

An answer five times as long as its p50, or longer than the equal lengths of its class, would otherwise be revised every
few tokens."""


@dataclass(slots=True, eq=False)
class Request:
    """One request. Times are monotonic seconds, sizes are tokens.

    Attributes:
        slo: the bounds that the client or its class asked for.
        cached_tokens: of the prompt, predicted to be in the engine's prefix cache; the engine's own count once it is
            known. ``uncached_tokens``: the others, which the engine must compute.
        shared_tokens: of the prompt, in KV memory for a running request already. Only while this one waits.
        requested_model: the model that the client asked for; "" for the default. ``model``: its engine's name for it.
        pool: names the engines that serve that model: all models of the same engines have the same. Set by the router.
        pinned_to: name of the only engine that can serve the request; "" if any engine of the model can.
        failed_on: names of the engines that have failed the request.
        blocks: hashes of the prompt's blocks (`gateway.requests.prefix_index`), of ``block_tokens`` tokens each.
        content: what the blocks are hashes of, ``block_bytes`` bytes each; empty if it is not known.
        predicted_tokens: y_i of the papers, the output length per sequence that is expected now. A request that
            outlives its prediction gets the length of the responses that do (`advance`).
        predicted_p90: its 90th percentile; 0 when unknown. Both are at most ``max_tokens``.
        predicted_at_arrival: the first prediction; it does not change.
        generated: output tokens of all ``sequences`` together.
        weight: of the tenant, against the other tenants of the engine (`gateway.policies.tenant_shares`).
        bounds_waived: the class serves the request without its bounds, because they cannot be met. ``kind`` is then
            best-effort, as it is for a request without any bound.
        unobserved: the engine reports no token before the response is complete.
        kind: what the scheduler must keep for this request.
        ttft_slo_s: T_i, infinite without a bound on the first token. ``deadline_s`` is a_i + T_i.
        pace_s: P_i, the seconds per token that the scheduler plans with: the TPOT bound, or what the end-to-end bound
            implies, or what the policy set at admission. None without a pace.
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
    weight: float = 1.0
    model: str = ""
    requested_model: str = ""
    pool: str = ""
    pinned_to: str = ""
    failed_on: tuple[str, ...] = ()
    max_tokens: float = math.inf
    blocks: tuple[int, ...] = ()
    block_tokens: float = 0.0
    content: bytes = b""
    block_bytes: int = 0
    cached_tokens: int = 0
    shared_tokens: int = 0
    bounds_waived: bool = False
    admitted_s: float | None = None
    first_token_s: float | None = None
    unobserved: bool = False
    generated: int = 0
    kind: ServiceKind = field(init=False)
    ttft_slo_s: float = field(init=False)
    pace_s: float | None = field(init=False)
    deadline_s: float = field(init=False)
    predicted_at_arrival: float = field(init=False)
    _p90_at_arrival: float = field(init=False)
    _beyond: tuple[float, float] | None = field(init=False, default=None)
    _revise_at: float = field(init=False)

    def __post_init__(self) -> None:
        self._set_length(self.predicted_tokens, self.predicted_p90)
        self._set_bounds()

    @property
    def prefilling(self) -> bool:
        """Whether an admitted request's prompt is still to be prefilled, as far as its engine tells."""
        return self.first_token_s is None and not self.unobserved

    @property
    def uncached_tokens(self) -> int:
        """Prompt tokens that the engine must compute, at least 1: the last one is never taken from the cache."""
        uncached = self.prompt_tokens - self.cached_tokens
        return uncached if uncached > 1 else 1

    @property
    def length(self) -> float:
        """Tokens of context per sequence: the prompt and what was generated so far."""
        return self.prompt_tokens + self.generated / self.sequences

    @property
    def remaining_tokens(self) -> float:
        """Output tokens per sequence that are still expected, at least 1."""
        return max(self.predicted_tokens - self.generated / self.sequences, 1.0)

    def mean_tpot_s(self, now: float) -> float:
        """Return the mean seconds per output token so far; 0 before the second token."""
        later = self.generated / self.sequences - 1
        return (now - self.first_token_s) / later if self.first_token_s is not None and later > 0 else 0.0

    def predict(self, tokens: float, p90: float, beyond: tuple[float, float] | None = None) -> None:
        """Set the predicted output length (tokens per sequence), before the first token.

        ``beyond``: the p50 and p90 to use instead if the response becomes longer than ``p90``.
        """
        self._beyond = beyond
        self._set_length(tokens, p90)
        if self.slo.e2e_s is not None:
            # Other bounds do not depend on the length.
            self._set_bounds()

    def replace_prediction(self, tokens: float, p90: float) -> None:
        """Replace the predicted output length at any time. There is no end-to-end bound, whose pace depends on it."""
        self._set_length(tokens, p90)
        self.advance(0)

    def advance(self, tokens: int) -> None:
        """Count ``tokens`` more output tokens.

        A request that reaches its predicted length L without ending is expected to become as long as half of those
        that do, Q(1/2 | L > g) (`gateway.requests.length_survival`), and is revised again half way there, or after
        `LEAST_AHEAD`. So this is one comparison per token, and the number of revisions grows with the logarithm of the
        length. ``pace_s`` stays: the engine has it.
        """
        self.generated += tokens
        if self.generated >= self._revise_at:
            self._revise_prediction()

    def wait_again(self) -> None:
        """Return to the queue: the engine that admitted this request did not serve it."""
        self.admitted_s = self.first_token_s = None
        self.unobserved, self.generated = False, 0
        self._set_length(self.predicted_at_arrival, self._p90_at_arrival)
        # The policy may have set another pace and kind at admission.
        self._set_bounds()

    def restore_bounds(self) -> None:
        """Ask for the bounds again: the request waits for another engine, which may meet them."""
        if self.bounds_waived:
            self.bounds_waived = False
            self._set_bounds()

    def serve_at_best_effort(self) -> None:
        """Waive the bounds: they cannot be met, and the request's class serves it as best-effort."""
        self.bounds_waived = True
        self._set_bounds()

    # --- end-to-end bounds ------------------------------------------------------------------------------------------

    @property
    def e2e_share_for_ttft(self) -> float:
        """The share of the end-to-end bound that is planned for the first token; 0 without such a bound."""
        if self.slo.e2e_s is None:
            return 0.0
        left = 1 - max(1.0, self.predicted_at_arrival) * E2E_PACE_S / self.slo.e2e_s
        return min(max(left, E2E_LEAST_FOR_TTFT), E2E_MOST_FOR_TTFT)

    def e2e_for_ttft(self, ttft_s: float) -> float:
        """The least end-to-end bound (s) of which ``ttft_s`` would be planned for the first token."""
        tail = max(1.0, self.predicted_at_arrival) * E2E_PACE_S
        return max(ttft_s / E2E_MOST_FOR_TTFT, min(ttft_s + tail, ttft_s / E2E_LEAST_FOR_TTFT))

    def e2e_for_tpot(self, tpot_s: float) -> float:
        """An end-to-end bound (s) that leaves ``tpot_s`` for each token, and as much again for the first one."""
        return tpot_s * max(1.0, self.predicted_at_arrival) / (1 - E2E_MOST_FOR_TTFT)

    # --- derived fields ---------------------------------------------------------------------------------------------

    def _set_length(self, tokens: float, p90: float) -> None:
        self.predicted_tokens, self.predicted_p90 = tokens, p90
        self.predicted_at_arrival, self._p90_at_arrival = tokens, p90
        self._revise_at = tokens * self.sequences

    def _revise_prediction(self) -> None:
        each = self.generated / self.sequences
        p50, p90, most = self.predicted_at_arrival, self._p90_at_arrival, self.max_tokens
        if self._beyond is not None and each >= p90:
            p50, p90 = self._beyond
        self.predicted_tokens = min(surviving_quantile(0.5, each, p50, p90), most)
        self.predicted_p90 = max(min(surviving_quantile(0.9, each, p50, p90), most), self.predicted_tokens)
        ahead = max((self.predicted_tokens - each) / 2, LEAST_AHEAD * each, 1.0)
        self._revise_at = (each + ahead) * self.sequences

    def _set_bounds(self) -> None:
        slo = self.slo
        ttft_s = math.inf if slo.ttft_s is None else slo.ttft_s
        pace_s = slo.tpot_s
        if slo.e2e_s is not None:
            share = self.e2e_share_for_ttft
            ttft_s = min(ttft_s, slo.e2e_s * share)
            implied_s = slo.e2e_s * (1 - share) / max(1.0, self.predicted_tokens)
            pace_s = implied_s if pace_s is None else min(pace_s, implied_s)
        if self.bounds_waived:
            ttft_s = math.inf
            pace_s = None if pace_s is None else max(pace_s, BEST_EFFORT_PACE_S)
        self.ttft_slo_s, self.pace_s, self.deadline_s = ttft_s, pace_s, self.arrival_s + ttft_s
        if self.bounds_waived or (pace_s is None and ttft_s == math.inf):
            self.kind = _BEST_EFFORT
        else:
            self.kind = _DEADLINE_ONLY if pace_s is None else _PACED
