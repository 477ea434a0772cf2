"""The running set of one engine as sums, with which `slack` and `tenant_shares` compute."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

from engine_adapter.engine import EngineState
from engine_adapter.gates.best_effort_preemption import reserved_slots
from engine_adapter.gates.constants import SLACK
from engine_adapter.service_kind import ServiceKind
from gateway.requests.request import Request

_PACED, _DEADLINE_ONLY, _YIELDING = ServiceKind.PACED, ServiceKind.DEADLINE_ONLY, ServiceKind.YIELDING


@dataclass(slots=True)
class RunningBatch:
    """The running set R on ``engine``, as sums.

    Attributes:
        memory_z: how many standard deviations of its memory are to stay free.
        beside_yielding: whether yielding requests count like all others; otherwise they count like best-effort ones.
        kept_free: the share of P* that is kept free for the requests of other tenants.
        slots, best_effort_slots: sequences, and the best-effort ones.
        decoding, context: sequences in a step and their tokens; without a pace they count by their share of steps.
        strictest_s: P*, the longest step that keeps the strictest pace: with speculative decoding, a step brings
            several tokens (`EngineState.tokens_per_step`).
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
        unpaced_share = SLACK.best_effort_share  # of steps, for deadline-only and best-effort requests
        decoding, context, strictest_s = self.decoding, self.context, self.strictest_s
        memory, preemptible_memory = self.memory, self.preemptible_memory
        variance, backlog = self.variance, self.backlog
        step_tokens = self.engine.tokens_per_step
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
                weight *= unpaced_share
                if kind is not _DEADLINE_ONLY:
                    best_effort_slots += sequences
                    if best_effort_slots > protected:
                        preemptible_memory += expected
            elif pace is not None and pace * step_tokens < strictest_s:
                strictest_s = pace * step_tokens
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
