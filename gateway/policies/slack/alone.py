"""The fast path of `slack`: one request waits, and the engine has room for it.

It makes the decision of `policy` without arrays, in a fifth of the time. Below capacity nearly all decisions are such.
"""

from __future__ import annotations

import math

from engine_adapter.gates.constants import SLACK
from engine_adapter.service_kind import ServiceKind
from gateway.policies.running_batch import RunningBatch
from gateway.requests.request import Request

_MARGIN = 0.95
"""Part of each time limit that is used: numbers round differently from arrays. The arrays decide beyond it."""


def fits_alone(request: Request, pace_s: float, batch: RunningBatch, now: float) -> bool:
    """Return whether lines 1 to 6 of `policy` admit the only waiting ``request`` beside ``batch`` at ``now`` (s).

    ``pace_s`` is the pace that is planned for it (s per token). False also where this needs the arrays.
    """
    if request.slo.e2e_s is not None or batch.backlog or not batch.has_capacity_for(request):
        return False
    if request.kind is ServiceKind.BEST_EFFORT:
        return True
    curve, uncached, sequences = batch.engine.step_time.curve, request.uncached_tokens, request.sequences
    length = request.prompt_tokens + request.predicted_tokens / 2
    weight = sequences if request.kind is ServiceKind.PACED else SLACK.best_effort_share * sequences
    step_s = curve.step_s(batch.decoding + weight, batch.context + length * weight)
    pace_s *= batch.engine.tokens_per_step
    strictest_s, left_s = min(pace_s, batch.strictest_s), _MARGIN * (request.deadline_s - now)
    if step_s > _MARGIN * strictest_s or curve.step_s(sequences, length * sequences) > _MARGIN * pace_s:
        return False
    start_s = batch.step_s / 2 + max(batch.step_s, curve.step_s(1, 0)) + curve.h
    if start_s + batch.prefill_token_s * uncached / batch.prefill_share > left_s:
        return False
    most = batch.engine.max_num_batched_tokens
    token_s = curve.prefill_token_s(batch.decoding + weight, most, strictest_s - step_s)
    chunk_s = min(strictest_s - step_s, token_s * most)
    steps = max(1, math.ceil(token_s * uncached / max(chunk_s, 1e-12)))
    return step_s + steps * (step_s + chunk_s) <= left_s
