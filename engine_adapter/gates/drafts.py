"""Speculative decoding in a step's token budget: a decode computes one token and its drafts."""

from __future__ import annotations

import math
from collections.abc import Sequence

from engine_adapter.gates.base import Decoding, StepPlan


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
