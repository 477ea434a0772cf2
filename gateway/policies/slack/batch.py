"""What `slack` computes with: the running set as sums, and the waiting requests as arrays."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine_adapter.engine import EngineState
from engine_adapter.gates.best_effort_preemption import reserved_slots
from engine_adapter.gates.constants import SLACK
from engine_adapter.service_kind import ServiceKind
from gateway.requests.request import Request
from gateway.requests.waiting_arrays import Floats, WaitingArrays

_PACED, _DEADLINE_ONLY, _YIELDING = ServiceKind.PACED, ServiceKind.DEADLINE_ONLY, ServiceKind.YIELDING
_UNPACED_SHARE = SLACK.best_effort_share  # of steps, for deadline-only and best-effort requests


@dataclass(slots=True)
class RunningBatch:
    """The running set R on ``engine``, as sums.

    Attributes:
        memory_z: how many standard deviations of its memory are to stay free.
        beside_yielding: whether yielding requests count like all others; otherwise they count like best-effort ones.
        kept_free: the share of P* that is kept free for the requests of other tenants.
        slots, best_effort_slots: sequences, and the best-effort ones.
        decoding, context: sequences in a step and their tokens; without a pace they count by their share of steps.
        strictest_s: P*, the strictest pace (s per token).
        memory, preemptible_memory, variance: tokens that R will reach, the unprotected best-effort part, the variance.
        backlog: uncached prompt tokens that are not prefilled yet.
        step_s: T(R), seconds of a step in which all of R decode; 0 when R is empty.
        prefill_token_s: mu(R), seconds that a prompt token costs in chunks that fill what R leaves of P* seconds.
    """

    engine: EngineState
    memory_z: float = 0.0
    beside_yielding: bool = False
    kept_free: float = 0.0
    slots: int = 0
    best_effort_slots: int = 0
    decoding: float = 0.0
    context: float = 0.0
    strictest_s: float = math.inf
    memory: float = 0.0
    preemptible_memory: float = 0.0
    variance: float = 0.0
    backlog: int = 0
    step_s: float = 0.0
    prefill_token_s: float = 0.0

    @classmethod
    def of(
        cls,
        running: Collection[Request],
        engine: EngineState,
        memory_z: float = 0.0,
        beside_yielding: bool = False,
        kept_free: float = 0.0,
    ) -> RunningBatch:
        """Return the sums over ``running``, oldest first."""
        batch = cls(engine, memory_z, beside_yielding, kept_free, memory=-engine.shared_tokens)
        batch.add(running)
        return batch

    def add(self, requests: Collection[Request], pace_s: float | None = None) -> None:
        """Add requests, each with its own pace or with ``pace_s``."""
        # Every running request is added in every decision, so the sums are local and the loop calls nothing.
        slots, best_effort_slots, protected = self.slots, self.best_effort_slots, self.protected_slots
        curve, beside_yielding = self.engine.step_time.curve, self.beside_yielding
        decoding, context, strictest_s = self.decoding, self.context, self.strictest_s
        memory, preemptible_memory = self.memory, self.preemptible_memory
        variance, backlog = self.variance, self.backlog
        for request in requests:
            sequences, predicted = request.sequences, request.predicted_tokens
            generated = request.generated / sequences
            weight: float = sequences
            slots += sequences
            expected = (request.prompt_tokens + (predicted if predicted - generated > 1 else generated + 1)) * sequences
            memory += expected
            kind, pace = request.kind, request.pace_s if pace_s is None else pace_s
            yields = kind is _YIELDING and not beside_yielding
            if yields or (kind is not _PACED and (kind is not _YIELDING or pace is None)):
                weight *= _UNPACED_SHARE
                if kind is not _DEADLINE_ONLY:
                    best_effort_slots += sequences
                    if best_effort_slots > protected:
                        preemptible_memory += expected
            elif pace is not None and pace < strictest_s:
                strictest_s = pace
            # A running request counts by its length now, because another takes its slot and begins short.
            length = request.prompt_tokens + generated
            if request.admitted_s is None:
                length = request.prompt_tokens + predicted / 2
                memory -= request.shared_tokens
            decoding += weight
            context += length * weight
            variance += request.variance
            if request.first_token_s is None and not request.unobserved and not yields:
                backlog += request.uncached_tokens
        self.slots, self.best_effort_slots = slots, best_effort_slots
        self.decoding, self.context, self.strictest_s = decoding, context, strictest_s
        self.memory, self.preemptible_memory = memory, preemptible_memory
        self.variance, self.backlog = variance, backlog
        self.step_s = step_s = curve.step_s(decoding, context)
        most = self.engine.max_num_batched_tokens
        self.prefill_token_s = curve.prefill_token_s(decoding, most, strictest_s - step_s)

    @property
    def reserved_slots(self) -> int:
        """Slots that best-effort requests keep in any case."""
        return reserved_slots(self.engine.max_num_seqs)

    @property
    def protected_slots(self) -> int:
        """Best-effort slots that cannot be preempted for the requests that this batch is for."""
        preempts = self.engine.gate.preemptible and not self.beside_yielding
        return self.reserved_slots if preempts else self.engine.max_num_seqs

    @property
    def free_slots(self) -> int:
        """Slots that are free for a request that may preempt best-effort ones."""
        return self.engine.max_num_seqs - self.slots + max(0, self.best_effort_slots - self.protected_slots)

    def has_capacity_for(self, request: Request) -> bool:
        """Whether slots and KV memory suffice for ``request`` too, without preempting any."""
        memory = self.memory + (request.prompt_tokens + max(request.predicted_tokens, 1.0)) * request.sequences
        memory += self.memory_z * math.sqrt(self.variance + request.variance) - request.shared_tokens
        has_memory = self.engine.kv_tokens <= 0 or memory <= self.engine.kv_tokens
        return has_memory and self.slots + request.sequences <= self.engine.max_num_seqs

    @property
    def prefill_share(self) -> float:
        """1 - T(R)/P*: the share of time that is left for prefill."""
        return max(SLACK.min_prefill_share, 1 - self.step_s / self.strictest_s)

    @property
    def chunk_tokens(self) -> float:
        """Prompt tokens that a step of P* seconds has time for beside the decodes, at least one."""
        spare_s, most = self.strictest_s - self.step_s, self.engine.max_num_batched_tokens
        return most if spare_s == math.inf else min(max(spare_s / max(self.prefill_token_s, 1e-12), 1.0), most)


@dataclass(slots=True)
class WaitingBatch:
    """The waiting requests that are not best-effort, in deadline order, and the pace that each needs now."""

    requests: Sequence[Request]
    arrays: WaitingArrays
    pace_s: Floats  # shape (n,), s per token, infinite without a pace

    @classmethod
    def of(
        cls, requests: Sequence[Request], arrays: WaitingArrays, batch: RunningBatch, now: float, fraction: float = 1.0
    ) -> WaitingBatch:
        """Return the arrays at ``now`` (s); ``fraction`` of a bound is the pace.

        What an end-to-end bound E leaves after the first token is shared by the y predicted tokens:
        P = (a + E - first) / y. The first token is expected when prefill gets to it, at the latest when it is due.
        """
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
        weight = np.where(of.kind[at] == float(_PACED), sequences, _UNPACED_SHARE * sequences)
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
