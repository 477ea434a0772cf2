"""The waiting requests as arrays, with which `slack` computes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine_adapter.engine import EngineState
from engine_adapter.gates.constants import SLACK
from engine_adapter.service_kind import ServiceKind
from gateway.policies.running_batch import RunningBatch
from gateway.requests.request import Request
from gateway.requests.waiting_arrays import Floats, WaitingArrays


@dataclass(slots=True)
class WaitingBatch:
    """The waiting requests that are not best-effort, in deadline order, and the pace that each needs now."""

    requests: Sequence[Request]
    arrays: WaitingArrays
    pace_s: Floats  # shape (n,), s per step, infinite without a pace

    @classmethod
    def of(
        cls, requests: Sequence[Request], arrays: WaitingArrays, batch: RunningBatch, now: float, fraction: float = 1.0
    ) -> WaitingBatch:
        """Return the arrays at ``now`` (s); ``fraction`` of a bound is the pace.

        What an end-to-end bound E leaves after the first token is shared by the y predicted tokens:
        P = (a + E - first) / y. The first token is expected when prefill gets to it, at the latest when it is due.
        """
        fraction *= batch.engine.tokens_per_step
        pace_s = fraction * arrays.pace
        ends = np.flatnonzero(arrays.end < math.inf)
        if len(ends):
            of = arrays.take(ends)
            first_s = now + batch.step_s + batch.prefill_token_s * (batch.backlog + of.uncached) / batch.prefill_share
            left_s = np.maximum(of.end - np.minimum(first_s, of.deadline), 0.0) / np.maximum(of.output, 1.0)
            pace_s[ends] = fraction * np.minimum(left_s, of.tpot_bound)
        return cls(requests, arrays, pace_s)

    def only(self, which: NDArray[np.bool_]) -> WaitingBatch:
        """Return the requests where ``which`` holds."""
        at = np.flatnonzero(which)
        return WaitingBatch([self.requests[i] for i in at.tolist()], self.arrays.take(at), self.pace_s[at])

    def alone_s(self, engine: EngineState) -> Floats:
        """Return the seconds per token of each request in an idle engine."""
        of = self.arrays
        return engine.step_time.curve.steps_s(of.sequences, (of.prompt + of.output / 2) * of.sequences)

    def cost_s(self, batch: RunningBatch) -> Floats:
        """Return w_i of each request: its seconds of engine time (line 3 of `policy`)."""
        of, curve, token_s = self.arrays, batch.engine.step_time.curve, batch.prefill_token_s
        # A decode costs what a prompt token does, without the discount that prefill tokens may have.
        decode_s = token_s + max(-curve.e, 0.0) + curve.a * (of.prompt + of.output / 2)
        return token_s * of.uncached + decode_s * of.sequences * of.output

    def fit(self, batch: RunningBatch, now: float, at: NDArray[np.intp]) -> NDArray[np.bool_]:
        """Return whether each request ``at`` can be admitted beside ``batch`` at ``now`` (s).

            slots(R + r) <= slots,   memory(R + r) + z * sqrt(variance(R + r)) <= KV memory,
            T(R + r) <= P*(R + r),   now + wait + prefill <= d_r,

        where T leaves ``kept_free`` of P*. ``wait`` is the step under way; ``prefill`` are the steps that the
        backlog and p_r take, each as long as P*, or as the token budget allows. A first token comes when its step ends,
        so the last step counts with the other prompts that fill it.
        """
        engine, of = batch.engine, self.arrays
        curve, sequences, prompt, output = engine.step_time.curve, of.sequences[at], of.prompt[at], of.output[at]
        weight = np.where(of.kind[at] == float(ServiceKind.PACED), sequences, SLACK.best_effort_share * sequences)
        strictest_s, decoding = np.minimum(self.pace_s[at], batch.strictest_s), batch.decoding + weight
        step_s = curve.steps_s(decoding, batch.context + (prompt + output / 2) * weight)
        token_s = curve.prefill_tokens_s(decoding, engine.max_num_batched_tokens, strictest_s - step_s)
        others_s = token_s * (of.uncached.sum() - of.uncached[at])
        ahead_s, own_s = token_s * batch.backlog, token_s * of.uncached[at]
        longest_s = np.maximum(step_s, np.minimum(strictest_s, step_s + token_s * engine.max_num_batched_tokens))
        wait_s = np.minimum(longest_s, step_s + ahead_s + others_s)
        full_steps = np.ceil((ahead_s + own_s) / np.maximum(longest_s - step_s, 1e-12)) - 1
        rest_s = ahead_s + own_s - full_steps * (longest_s - step_s)
        first_s = wait_s + full_steps * longest_s + np.minimum(longest_s, step_s + rest_s + others_s)
        fits = (sequences <= batch.free_slots) & (step_s <= (1 - batch.kept_free) * strictest_s)
        fits &= now + first_s <= of.deadline[at]
        if engine.kv_tokens > 0:
            # What is preempted may hold all shared tokens, which the others then need for themselves.
            others = np.minimum(-of.shared[at], engine.shared_tokens - batch.preemptible_memory)
            memory = batch.memory + others + sequences * (prompt + np.maximum(output, 1.0))
            fits &= memory + batch.memory_z * np.sqrt(batch.variance + of.variance[at]) <= engine.kv_tokens
        return np.asarray(fits, dtype=np.bool_)
