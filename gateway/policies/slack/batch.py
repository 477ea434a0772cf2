"""The waiting requests as arrays, and the tests for admission: of arrays, and of one request."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine_adapter.gates.constants import SLACK
from engine_adapter.service_kind import ServiceKind
from gateway.policies.running_batch import RunningBatch
from gateway.requests.request import Request
from gateway.requests.waiting_arrays import Floats, WaitingArrays

# Looking a member up in its class costs more than comparing it.
_PACED, _BEST_EFFORT = ServiceKind.PACED, ServiceKind.BEST_EFFORT

_MARGIN = 0.95
"""Part of each time limit that `surely_fits` uses: numbers round differently from arrays, which decide beyond it."""


@dataclass(slots=True)
class WaitingBatch:
    """The waiting requests that are not best-effort, in deadline order, and the pace that each needs now."""

    requests: Sequence[Request]
    arrays: WaitingArrays
    pace_s: Floats  # shape (n,), s per token, infinite without a pace

    @classmethod
    def of(cls, requests: Sequence[Request], of: WaitingArrays, now: float) -> WaitingBatch:
        """Return the requests at ``now`` (s). Of an end-to-end bound, the y predicted tokens share what is left."""
        left_s = of.end - np.minimum(of.deadline, now)  # past the deadline, line 2 of `policy` rejects
        return cls(requests, of, np.minimum(left_s / np.maximum(of.output, 1.0), of.tpot_bound))

    def only(self, which: NDArray[np.bool_]) -> WaitingBatch:
        """Return the requests where ``which`` holds."""
        at = np.flatnonzero(which)
        return WaitingBatch([self.requests[i] for i in at.tolist()], self.arrays.take(at), self.pace_s[at])

    def cost_s(self, batch: RunningBatch) -> Floats:
        """Return w_i of each request: its seconds of engine time (line 3 of `policy`)."""
        of, curve, token_s = self.arrays, batch.engine.step_time.curve, batch.prefill_token_s
        # A decode costs what a prompt token does, without the discount that prefill tokens may have.
        decode_s = token_s + max(-curve.e, 0.0) + curve.a * (of.prompt + of.output / 2)
        decodes = of.output / batch.engine.tokens_per_step
        return token_s * of.uncached + decode_s * of.sequences * decodes

    def fit(self, batch: RunningBatch, now: float, at: NDArray[np.intp]) -> NDArray[np.bool_]:
        """Return whether each request ``at`` can be admitted beside ``batch`` at ``now`` (s).

            slots(R + r) <= slots,   memory(R + r) <= KV memory,   T(R + r) <= (1 - kept_free) * P*(R + r),
            now + t_q + n * T(R + r) + min(n * chunk, mu * (2 * backlog + all p)) <= d_r,

        The first q tokens of the prompts take t_q seconds (`RunningBatch.full_steps`). The others take n steps, with
        n = 2 + mu * (backlog + p_r - q) / chunk: the step under way, steps with ``chunk`` seconds of prefill, and the
        last step, which must end too. P* and the token budget limit ``chunk``. Prefill takes at most the time of all
        prompts.
        """
        engine, of = batch.engine, self.arrays
        curve, sequences, prompt, output = engine.step_time.curve, of.sequences[at], of.prompt[at], of.output[at]
        weight = np.where(of.kind[at] == float(ServiceKind.PACED), sequences, SLACK.best_effort_share * sequences)
        strictest_s, decoding = (
            np.minimum(self.pace_s[at] * engine.tokens_per_step, batch.strictest_s),
            batch.decoding + weight,
        )
        step_s = curve.steps_s(decoding, batch.context + (prompt + output / 2) * weight)
        token_s = curve.prefill_tokens_s(decoding, engine.max_num_batched_tokens, strictest_s - step_s)
        chunk_s = np.maximum(np.minimum(strictest_s - step_s, token_s * engine.max_num_batched_tokens), 1e-12)
        tokens, most_s = batch.backlog + of.uncached[at], token_s * (2 * batch.backlog + of.uncached.sum())
        in_full_steps, full_token_s = batch.full_steps
        full = np.minimum(tokens, in_full_steps)
        steps = 2 + token_s * (tokens - full) / chunk_s
        first_s = full * full_token_s + steps * step_s + np.minimum(steps * chunk_s, most_s)
        fits = (sequences <= batch.free_slots) & (step_s <= (1 - batch.kept_free) * strictest_s)
        fits &= now + first_s <= of.deadline[at]
        if engine.kv_tokens > 0:
            # What is preempted may hold all shared tokens, which the others then need for themselves.
            others = np.minimum(-of.shared[at], engine.shared_tokens - batch.preemptible_memory)
            fits &= batch.memory + others + sequences * (prompt + np.maximum(output, 1.0)) <= engine.kv_tokens
        return np.asarray(fits, dtype=np.bool_)


def surely_fits(request: Request, pace_s: float, batch: RunningBatch, now: float, waiting_tokens: float) -> bool:
    """Return whether `WaitingBatch.fit` surely holds for ``request``, without arrays; if False, these must tell.

    ``waiting_tokens``: prompt tokens of all that wait.
    """
    if not batch.has_room_for(request):
        return False
    curve, most = batch.engine.step_time.curve, batch.engine.max_num_batched_tokens
    weight = request.sequences * (1.0 if request.kind is _PACED else SLACK.best_effort_share)
    decoding = batch.decoding + weight
    step_s = curve.step_s(decoding, batch.context + (request.prompt_tokens + request.predicted_tokens / 2) * weight)
    strictest_s = min(pace_s * batch.engine.tokens_per_step, batch.strictest_s)
    spare_s = _MARGIN * (1 - batch.kept_free) * strictest_s - step_s
    token_s = curve.prefill_token_s(decoding, most, strictest_s - step_s)
    chunk_s = max(min(spare_s, token_s * most), 1e-12)
    in_full_steps, full_token_s = batch.full_steps
    tokens = batch.backlog + request.uncached_tokens
    full = min(tokens, in_full_steps)
    steps = 2 + token_s * (tokens - full) / chunk_s
    most_s = token_s * (2 * batch.backlog + waiting_tokens)
    first_s = full * full_token_s + steps * step_s + min(steps * chunk_s, most_s)
    return spare_s > 0 and first_s + curve.h <= _MARGIN * (request.deadline_s - now)


def fits_alone(request: Request, batch: RunningBatch, now: float) -> bool:
    """Return whether lines 1 to 7 of `policy` surely admit ``request``, which waits alone, without any array.

    Its prompt must fit the prefill lookahead.
    """
    if request.slo.e2e_s is not None:
        return False
    if request.kind is _BEST_EFFORT:
        return batch.has_room_for(request)
    pace_s = math.inf if request.pace_s is None or request.kind is not _PACED else request.pace_s
    return surely_fits(request, pace_s, batch, now, request.uncached_tokens)
