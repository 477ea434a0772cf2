"""The step-time profile of an engine that runs, from what its step-time model has learned."""

from __future__ import annotations

import math
from itertools import pairwise

from engine_adapter.step_time.curve import KNOTS, StepCurve
from engine_adapter.step_time.profile import Profile, Regime


def live_profile(
    name: str,
    curve: StepCurve,
    *,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    max_model_len: int,
    kv_tokens: int,
    plans_ahead: bool,
) -> Profile:
    """Return the profile of an engine with the step ``curve`` and these limits (tokens).

    The curve is piecewise linear in the tokens of a step, so each part of it is one regime. Beyond the last knot,
    the last slope continues.
    """
    knots, values = KNOTS.tolist(), curve.at_knots.tolist()
    regimes = []
    for number, ((left, right), (low, high)) in enumerate(zip(pairwise(knots), pairwise(values), strict=True)):
        slope = (high - low) / (right - left)
        regimes.append(
            Regime(
                up_to_tokens=right if number < len(knots) - 2 else math.inf,
                base=low - slope * left,
                per_token=slope,
                per_prefill_token=curve.e,
                per_decode=0.0,
                per_decode_context=curve.a,
                per_prefill_context=0.0,
                per_prefill_step=curve.h,
            )
        )
    return Profile(
        name=name,
        description="learned by a running gateway",
        provenance={},
        regimes=tuple(regimes),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_model_len=max_model_len,
        kv_tokens=max(kv_tokens, max_model_len),
        plans_ahead=plans_ahead,
    )
