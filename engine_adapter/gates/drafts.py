"""Speculative decoding in a step: which decodes keep their drafts, and whether these fit in the token budget.

A decode computes one token and its k drafts, of which a are accepted on average. Drafts cost engine time, but a request
with pace P that has drafts keeps it in steps of (1 + a) * P. Longer steps compute more tokens per second, because a part
of a step's time is fixed. So drafts pay for the strictest paces, which bound the step, and rarely for loose ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from engine_adapter.gates.base import Decoding, StepPlan
from engine_adapter.step_report import Acceptance
from engine_adapter.step_time.curve import StepCurve

_CHOICES = 8
"""Numbers of drafting requests that `loosest_drafts` compares, to bound its time."""


def loosest_drafts(decoding: Sequence[Decoding], acceptance: Acceptance, curve: StepCurve, backlog: int) -> set[str]:
    """Return the requests that decode without their drafts.

    If the n strictest of D requests have drafts, a step may take B = min((1 + a) * P_1, P_(n+1)), and brings D + n * a
    tokens, and as many of ``backlog`` prefill tokens as fit. Of the n with T <= B, the one with the most tokens per
    second is best; without any, the one with the least T / B.

    INVARIANT: one request keeps its drafts, so a is always measured. ``accepted`` is a; while it is 0, all keep them.
    """
    drafting = [r for r in decoding if r.drafts]
    accepted = acceptance.accepted
    if not accepted or len(drafting) < 2:
        return set()
    drafting.sort(key=lambda request: request.pace_s or math.inf)
    context, without = sum([r.length for r in decoding]), [r.pace_s for r in decoding if not r.drafts and r.pace_s]
    strictest, plain = drafting[0].pace_s or math.inf, min(without, default=math.inf)
    best, best_key = len(drafting), (-math.inf, -math.inf)
    for choice in range(1, _CHOICES + 1):
        n = max(1, choice * len(drafting) // _CHOICES)
        next_pace = (drafting[n].pace_s if n < len(drafting) else None) or math.inf
        within_s = min((1 + acceptance.planned) * strictest, next_pace, plain)
        computed = len(decoding) + sum([r.drafts for r in drafting[:n]])
        alone_s = curve.step_s(computed, context)
        chunk = curve.fitting(computed, context, within_s, backlog) if backlog else 0
        rate = (len(decoding) + n * accepted + chunk) / max(curve.step_s(computed, context, chunk), 1e-9)
        key = (0.0, rate) if alone_s <= within_s else (within_s / alone_s - 1, rate)
        if key > best_key:
            best, best_key = n, key
    return {request.request_id for request in drafting[best:]}


def fit_drafts(decoding: Sequence[Decoding], plan: StepPlan, budget: int) -> int:
    """Return the tokens of the decodes of ``plan``. If they exceed ``budget``, drop drafts, loosest pace first.

    vLLM fills the budget in order of admission. With drafts that do not fit, the requests at the end never decode.
    """
    tokens = 0
    for request in decoding:
        if request.request_id not in plan.sit_out:
            tokens += 1 if request.request_id in plan.drop_drafts else 1 + request.drafts
    if tokens <= budget or all(request.pace_s is None for request in decoding):
        return tokens
    without = plan.sit_out | plan.drop_drafts
    drafting = [r for r in decoding if r.drafts and r.request_id not in without]
    drafting.sort(key=lambda request: request.pace_s or math.inf)
    while tokens > budget and drafting:
        loosest = drafting.pop()
        plan.drop_drafts.add(loosest.request_id)
        tokens -= loosest.drafts
    return tokens
