"""Speculative decoding in a step: which requests keep how many drafts, and whether these fit in the token budget.

A decode computes one token and its drafts. Drafts cost engine time, but a request with pace P of which a drafts are
accepted on average keeps its pace in steps of (1 + a) * P. Longer steps compute more tokens per second, because a part
of a step's time is fixed. So drafts pay for the strictest paces, which bound the step, and rarely for loose ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from engine_adapter.gates.base import Decoding, StepPlan
from engine_adapter.step_report import Acceptance
from engine_adapter.step_time.curve import StepCurve

_CHOICES = 4
"""Numbers of drafting requests that `best_drafts` compares, to bound its time."""


def best_drafts(decoding: Sequence[Decoding], acceptance: Acceptance, curve: StepCurve, backlog: int) -> dict[str, int]:
    """Return the requests that do not keep all of their drafts, and how many each keeps.

    If the n strictest of D requests keep k drafts, a step may take B = min((1 + a_k) * P_1, P_(n+1)), and brings
    D + n * a_k tokens, and as many of ``backlog`` prefill tokens as fit. Of the (n, k) with T <= B, the one with the
    most tokens per second is best; without any, the one with the least T / B.

    INVARIANT: one request keeps a draft, so that acceptance is always measured. Until it is measured, or without a
    paced request, all drafts are kept.
    """
    drafting = [r for r in decoding if r.drafts]
    if not acceptance.rate or len(drafting) < 2 or all(r.pace_s is None for r in decoding):
        return {}
    drafting.sort(key=lambda request: request.pace_s or math.inf)
    context, without = sum([r.length for r in decoding]), [r.pace_s for r in decoding if not r.drafts and r.pace_s]
    strictest, plain = drafting[0].pace_s or math.inf, min(without, default=math.inf)
    best, best_key = (len(drafting), drafting[0].drafts), (-math.inf, -math.inf)
    for choice in range(_CHOICES + 1):
        n = max(1, choice * len(drafting) // _CHOICES)
        next_pace = (drafting[n].pace_s if n < len(drafting) else None) or math.inf
        for k in range(1, drafting[0].drafts + 1):
            within_s = min((1 + acceptance.expected(k)) * strictest, next_pace, plain)
            computed = len(decoding) + n * k
            alone_s = curve.step_s(computed, context)
            chunk = curve.fitting(computed, context, within_s, backlog) if backlog else 0
            tokens = len(decoding) + n * acceptance.expected(k) + chunk
            rate = tokens / max(curve.step_s(computed, context, chunk), 1e-9)
            key = (0.0, rate) if alone_s <= within_s else (within_s / alone_s - 1, rate)
            if key > best_key:
                best, best_key = (n, k), key
    n, k = best
    kept = {request.request_id: k for request in drafting[:n] if request.drafts > k}
    return kept | {request.request_id: 0 for request in drafting[n:]}


def fit_drafts(decoding: Sequence[Decoding], plan: StepPlan, budget: int) -> int:
    """Return the tokens of the decodes of ``plan``. If they exceed ``budget``, drop drafts, loosest pace first.

    vLLM fills the budget in order of admission. With drafts that do not fit, the requests at the end never decode.
    """
    tokens = 0
    for request in decoding:
        if request.request_id not in plan.sit_out:
            tokens += 1 + plan.drafts.get(request.request_id, request.drafts)
    if tokens <= budget or all(request.pace_s is None for request in decoding):
        return tokens
    drafting = [r for r in decoding if r.request_id not in plan.sit_out]
    drafting.sort(key=lambda request: request.pace_s or math.inf)
    while tokens > budget and drafting:
        loosest = drafting.pop()
        tokens -= plan.drafts.get(loosest.request_id, loosest.drafts)
        plan.drafts[loosest.request_id] = 0
    return tokens
