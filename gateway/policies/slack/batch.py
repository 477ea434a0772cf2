"""What `slack` computes with: the running set as sums, and the waiting requests as arrays."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from engine_adapter.engine import EngineState
from engine_adapter.gates.best_effort_preemption import reserved_slots
from engine_adapter.gates.constants import SLACK
from engine_adapter.service_kind import ServiceKind
from gateway.requests.request import Request
from gateway.requests.waiting_arrays import Floats, WaitingArrays

_PACED, _BEST_EFFORT = ServiceKind.PACED, ServiceKind.BEST_EFFORT
_BEST_EFFORT_SHARE = SLACK.best_effort_share


@dataclass(slots=True)
class RunningBatch:
    """The running set R on ``engine``, as sums.

    Attributes:
        slots: sequences in the engine; ``best_effort_slots`` of them are best-effort.
        reserved: best-effort slots that no other request takes (`best_effort_preemption`); all, if none is preempted.
        decoding, context: sequences that take part in a step, and their tokens of context. Requests without a pace
            count by the share of steps that they are sure of.
        strictest_s: P*, the strictest pace (s per token).
        memory, variance: the tokens that R is expected to reach, and the variance of that sum.
        preemptible_memory: of ``memory``, what best-effort requests beyond ``reserved`` hold.
    """

    engine: EngineState
    reserved: int
    slots: int = 0
    best_effort_slots: int = 0
    decoding: float = 0.0
    context: float = 0.0
    strictest_s: float = math.inf
    memory: float = 0.0
    preemptible_memory: float = 0.0
    variance: float = 0.0
    _prefill_token_s: float | None = None

    @classmethod
    def of(cls, running: Collection[Request], engine: EngineState) -> RunningBatch:
        """Return the sums over ``running``, oldest first."""
        preempts = engine.gate.preemptible
        batch = cls(engine, reserved_slots(engine.max_num_seqs) if preempts else engine.max_num_seqs)
        batch.add(running, [request.pace_s for request in running])
        return batch

    def add(self, requests: Collection[Request], paces_s: Sequence[float | None]) -> None:
        """Add requests with the paces that they are planned with."""
        # Every running request is added in every decision, so the sums are local and the loop calls nothing.
        slots, best_effort_slots, reserved = self.slots, self.best_effort_slots, self.reserved
        decoding, context, strictest_s = self.decoding, self.context, self.strictest_s
        memory, preemptible_memory, variance = self.memory, self.preemptible_memory, self.variance
        for request, pace_s in zip(requests, paces_s, strict=True):
            sequences, predicted = request.sequences, request.predicted_tokens
            generated = request.generated / sequences
            weight: float = sequences
            slots += sequences
            expected = (request.prompt_tokens + (predicted if predicted - generated > 1 else generated + 1)) * sequences
            memory += expected
            if request.kind is not _PACED:
                weight *= _BEST_EFFORT_SHARE
                if request.kind is _BEST_EFFORT:
                    best_effort_slots += sequences
                    if best_effort_slots > reserved:
                        preemptible_memory += expected
            elif pace_s is not None and pace_s < strictest_s:
                strictest_s = pace_s
            # A running request counts by its length now, because another takes its slot and begins short.
            length = request.prompt_tokens + (generated if request.admitted_s is not None else predicted / 2)
            decoding += weight
            context += length * weight
            variance += request.variance
        self.slots, self.best_effort_slots = slots, best_effort_slots
        self.decoding, self.context, self.strictest_s = decoding, context, strictest_s
        self.memory, self.preemptible_memory, self.variance = memory, preemptible_memory, variance
        self._prefill_token_s = None

    @property
    def slots_in_use(self) -> int:
        """Slots that are not free for a request that may preempt best-effort ones."""
        return self.slots - max(0, self.best_effort_slots - self.reserved)

    @property
    def memory_in_use(self) -> float:
        """Tokens of KV memory that are not free for a request that may preempt best-effort ones."""
        return self.memory - self.preemptible_memory

    @property
    def step_s(self) -> float:
        """T(R): seconds of a step in which all of R decode; 0 when R is empty."""
        return self.engine.step_time.curve.step_s(self.decoding, self.context)

    @property
    def prefill_token_s(self) -> float:
        """mu(R): seconds that a prompt token costs in chunks that fill what R leaves of a step of P* seconds."""
        if self._prefill_token_s is None:
            spare_s, most = self.strictest_s - self.step_s, self.engine.max_num_batched_tokens
            self._prefill_token_s = self.engine.step_time.curve.prefill_token_s(self.decoding, most, spare_s)
        return self._prefill_token_s

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
    """The waiting requests that are not best-effort, in deadline order; arrays of shape (n,).

    Attributes:
        due_s: the deadline, or when the maximum wait ends (monotonic s).
        pace_s: the pace that is asked for at admission (s per token); infinite without one.
        planned_pace_s: the pace to plan with once it runs.
        prefill_s: mu * p, seconds.
    """

    requests: Sequence[Request]
    arrays: WaitingArrays
    due_s: Floats
    pace_s: Floats
    planned_pace_s: Floats
    prefill_s: Floats

    @classmethod
    def of(
        cls,
        requests: Sequence[Request],
        arrays: WaitingArrays,
        batch: RunningBatch,
        *,
        now: float,
        backlog: int,
        max_wait_s: float,
        tpot_target_fraction: float = 1.0,
    ) -> WaitingBatch:
        """Return the arrays at ``now`` (s), with ``backlog`` prompt tokens in the engine.

        What an end-to-end bound E leaves after the first token is shared by the y predicted tokens,
        P = (a + E - first) / y, and `e2e_pace_factor` times that is planned once the request runs. The first token is
        expected when prefill gets to it, at the latest when it is due.
        """
        pace_s = planned_s = tpot_target_fraction * arrays.pace
        ends = np.flatnonzero(arrays.end < math.inf)
        if len(ends):
            of = arrays.take(ends)
            wait_s = batch.step_s + batch.prefill_token_s * (backlog + of.prompt) / batch.prefill_share
            left_s = np.maximum(of.end - np.minimum(now + wait_s, of.deadline), 0.0) / np.maximum(of.output, 1.0)
            pace_s, planned_s = pace_s.copy(), pace_s.copy()
            pace_s[ends] = tpot_target_fraction * np.minimum(left_s, of.tpot_bound)
            planned_s[ends] = tpot_target_fraction * np.minimum(SLACK.e2e_pace_factor * left_s, of.tpot_bound)
        due_s = np.minimum(arrays.deadline, arrays.arrival + max_wait_s)
        return cls(requests, arrays, due_s, pace_s, planned_s, batch.prefill_token_s * arrays.prompt)

    def only(self, which: NDArray[np.bool_]) -> WaitingBatch:
        """Return the requests where ``which`` holds."""
        at = np.flatnonzero(which)
        rest = [array[at] for array in (self.due_s, self.pace_s, self.planned_pace_s, self.prefill_s)]
        return WaitingBatch([self.requests[i] for i in at.tolist()], self.arrays.take(at), *rest)

    def alone_s(self, engine: EngineState) -> Floats:
        """Seconds per token of each request in an idle engine."""
        of = self.arrays
        return engine.step_time.curve.steps_s(of.sequences, (of.prompt + of.output / 2) * of.sequences)

    def cost_s(self, batch: RunningBatch, at: NDArray[np.intp]) -> Floats:
        """w_i of the requests ``at``: their seconds of engine time (module `policy`, line 3)."""
        of, curve, token_s = self.arrays, batch.engine.step_time.curve, batch.prefill_token_s
        # A decode costs what a token of prompt does, without the discount that prefill tokens may have.
        decode_s = token_s + max(-curve.e, 0.0) + curve.a * (of.prompt[at] + of.output[at] / 2)
        return token_s * of.prompt[at] + decode_s * of.sequences[at] * of.output[at]

    def fit(
        self, batch: RunningBatch, now: float, backlog: int, at: NDArray[np.intp], *, memory_z: float
    ) -> NDArray[np.bool_]:
        """Whether each request ``at`` can run beside ``batch``: slots, memory, pace and its own deadline.

        With R + r the batch and the request, and ``backlog`` prompt tokens in the engine:

            slots(R + r) <= slots,   memory(R + r) + z * sqrt(variance(R + r)) <= KV memory,
            T(R + r) <= P*(R + r),   now + wait + mu * (backlog + p_r) / (1 - T(R + r)/P*) <= d_r,

        where the step under way must end first, and takes up to P* while other prompts wait.
        """
        engine, of = batch.engine, self.arrays
        curve, sequences, prompt, pace_s = engine.step_time.curve, of.sequences[at], of.prompt[at], self.pace_s[at]
        weight = np.where(of.kind[at] == _PACED, sequences, _BEST_EFFORT_SHARE * sequences)
        strictest_s = np.minimum(pace_s, batch.strictest_s)
        decoding = batch.decoding + weight
        step_s = curve.steps_s(decoding, batch.context + (prompt + of.output[at] / 2) * weight)
        token_s = curve.prefill_tokens_s(decoding, engine.max_num_batched_tokens, strictest_s - step_s)
        others = backlog + of.prompt.sum() - prompt
        wait_s = np.maximum(step_s, np.minimum(strictest_s, step_s + token_s * others))
        first_s = wait_s + token_s * (backlog + prompt) / np.maximum(1 - step_s / strictest_s, 1e-12)
        fits = (batch.slots_in_use + sequences <= engine.max_num_seqs) & (step_s <= strictest_s)
        fits &= now + first_s <= of.deadline[at]
        if engine.kv_tokens > 0:
            memory = batch.memory_in_use + sequences * (prompt + np.maximum(of.output[at], 1.0))
            fits &= memory + memory_z * np.sqrt(batch.variance + of.variance[at]) <= engine.kv_tokens
        return np.asarray(fits, dtype=np.bool_)


def normal_quantile(risk: float) -> float:
    """Return z such that a normal variable exceeds its mean by z standard deviations with probability ``risk``."""
    return NormalDist().inv_cdf(1 - risk)
