"""The running set of one engine as sums, with which `slack` and `tenant_shares` compute."""

from __future__ import annotations

import math
from collections.abc import Collection

from engine_adapter.engine import EngineState
from engine_adapter.gates.best_effort_preemption import reserved_slots
from engine_adapter.gates.constants import SLACK
from engine_adapter.service_kind import ServiceKind
from engine_adapter.step_time.curve import SPENT
from gateway.policies.base import PrefillLookahead
from gateway.requests.request import Request

_PACED, _DEADLINE_ONLY, _YIELDING = ServiceKind.PACED, ServiceKind.DEADLINE_ONLY, ServiceKind.YIELDING


class RunningBatch:
    """The running set R on ``engine``, as sums over ``running``, oldest first, at ``now`` (monotonic s).

    Sequences of others than this gateway take their time of each step. They do not count in ``slots`` and ``memory``:
    where they fill these, requests wait in the engine's own queue, beside theirs.

    Attributes:
        beside_yielding: whether yielding requests count like all others; otherwise they count like best-effort ones.
        kept_free: the share of P* that is kept free for the requests of other tenants.
        slots, best_effort_slots: sequences, and the best-effort ones.
        protected_slots: best-effort slots that cannot be preempted for the requests that this batch is for.
        decoding, context: sequences in a step and their tokens; without a pace they count by their share of steps.
        strictest_s: P*, the longest step that keeps the strictest pace (s): that pace times the tokens of a step
            (`EngineState.tokens_per_step`).
        memory, preemptible_memory: tokens of KV memory that R will reach, and the unprotected best-effort part.
        backlog: uncached prompt tokens that are not prefilled yet.
        due_s: when the first token of R that is not late yet is due by its pace (monotonic s); infinite without one.
        step_s: T(R), seconds of a step in which all of R decode; 0 when R is empty.
    """

    def __init__(
        self,
        running: Collection[Request],
        engine: EngineState,
        beside_yielding: bool = False,
        kept_free: float = 0.0,
        now: float = math.inf,
    ) -> None:
        self.engine, self.beside_yielding, self.kept_free = engine, beside_yielding, kept_free
        self.slots = self.best_effort_slots = self.backlog = 0
        preempts = engine.gate.preemptible and not beside_yielding
        self.protected_slots = reserved_slots(engine.max_num_seqs) if preempts else engine.max_num_seqs
        self.decoding = self.context = self.preemptible_memory = 0.0
        if engine.foreign_decodes:
            self.decoding, self.context = float(engine.foreign_decodes), engine.foreign_tokens
        self.strictest_s, self.memory = math.inf, -float(engine.shared_tokens)
        self.now, self.due_s = now, math.inf
        self.step_s = 0.0
        self._prefill_token_s: float | None = None
        if running or engine.foreign_decodes:
            self.add(running)

    def add(self, requests: Collection[Request], pace_s: float | None = None) -> None:
        """Add requests, each with its own pace or with ``pace_s``."""
        # Every running request is added in every decision, so the sums are local and the loop calls nothing.
        slots, best_effort_slots, protected = self.slots, self.best_effort_slots, self.protected_slots
        curve, beside_yielding, unpaced = self.engine.step_time.curve, self.beside_yielding, SLACK.best_effort_share
        decoding, context, strictest_s = self.decoding, self.context, self.strictest_s
        step_tokens = self.engine.tokens_per_step
        memory, preemptible_memory, backlog = self.memory, self.preemptible_memory, self.backlog
        now, due_s = self.now, self.due_s
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
                weight *= unpaced
                if kind is not _DEADLINE_ONLY:
                    best_effort_slots += sequences
                    if best_effort_slots > protected:
                        preemptible_memory += expected
            elif pace is not None:
                if pace * step_tokens < strictest_s:  # noqa: PLR1730  # min() takes three times as long.
                    strictest_s = pace * step_tokens
                first_s = request.first_token_s
                if first_s is not None and now <= first_s + pace * generated < due_s:
                    due_s = first_s + pace * generated
            # A running request counts by its length now, because another takes its slot and begins short.
            length = request.prompt_tokens + generated
            if request.admitted_s is None:
                length = request.prompt_tokens + predicted / 2
                memory -= request.shared_tokens
            decoding += weight
            context += length * weight
            if request.first_token_s is None and not request.unobserved and not yields:
                backlog += request.uncached_tokens
        self.slots, self.best_effort_slots = slots, best_effort_slots
        self.decoding, self.context, self.strictest_s = decoding, context, strictest_s
        self.memory, self.preemptible_memory, self.backlog = memory, preemptible_memory, backlog
        self.due_s = due_s
        self.step_s = curve.step_s(decoding, context)
        self._prefill_token_s = None

    @property
    def prefill_token_s(self) -> float:
        """mu(R): seconds that a prompt token costs in chunks that fill what R leaves of P* seconds."""
        token_s = self._prefill_token_s
        if token_s is None:
            curve, most = self.engine.step_time.curve, self.engine.max_num_batched_tokens
            token_s = curve.prefill_token_s(self.decoding, most, self.strictest_s - self.step_s)
            # Most decisions admit a lone request and ask once, for the batch with it.
            self._prefill_token_s = token_s
        return token_s

    @property
    def full_steps(self) -> tuple[float, float]:
        """Prompt tokens that full steps take before R is late, and the seconds of such a step per token.

        R has gained this time by decoding faster than its paces. A full step of F seconds uses F - P* of it. While no
        request of R decodes, its own prompts take full steps.
        """
        if math.inf in (self.now, self.strictest_s):
            return 0.0, 0.0
        most = self.engine.max_num_batched_tokens
        full_s = self.engine.step_time.curve.step_s(self.decoding, self.context, most)
        if self.due_s == math.inf:
            return float(self.backlog), full_s / most
        gained_s = (1 - self.kept_free) * SPENT * (self.due_s - self.now) - self.strictest_s
        if gained_s <= 0:
            return 0.0, 0.0
        steps = gained_s / (full_s - self.strictest_s) if full_s > self.strictest_s else math.inf
        return steps * most, full_s / most

    @property
    def free_slots(self) -> int:
        """Slots that are free for a request that may preempt best-effort ones."""
        return self.engine.max_num_seqs - self.slots + max(0, self.best_effort_slots - self.protected_slots)

    def has_room_for(self, request: Request) -> bool:
        """Whether slots and KV memory suffice for ``request`` too, without preempting any."""
        memory = self.memory + (request.prompt_tokens + max(request.predicted_tokens, 1.0)) * request.sequences
        has_memory = self.engine.kv_tokens <= 0 or memory - request.shared_tokens <= self.engine.kv_tokens
        return has_memory and self.slots + request.sequences <= self.engine.max_num_seqs

    @property
    def prefill_share(self) -> float:
        """1 - T(R)/P*: the share of time that is left for prefill."""
        return max(SLACK.min_prefill_share, 1 - self.step_s / self.strictest_s)

    def lookahead(self, steps: float) -> PrefillLookahead:
        """Return a lookahead of ``steps`` steps of P* seconds, with the prompt tokens that fit beside the decodes."""
        steps += self.engine.reaction_steps
        spare_s, most = self.strictest_s - self.step_s, self.engine.max_num_batched_tokens
        chunk = most if spare_s == math.inf else min(max(spare_s / max(self.prefill_token_s, 1e-12), 1.0), most)
        return PrefillLookahead(self.backlog, steps * chunk)
