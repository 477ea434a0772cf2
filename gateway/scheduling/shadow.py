"""A shadow policy: it decides on copies of the live requests and serves none of them.

A shadow has its own waiting queue and running set, since its decisions differ from those of the active policy. A
request may still run in the shadow after the engine has finished or rejected it, and the reverse. The shadow therefore
estimates the progress of its running set. Let B sequences of mean length L decode, T = ITL(B, L) be the time of their
step, and t_c the prefill time of one step's token budget. Each second is divided as follows:

    t_c / (t_c + T)     prefills one prompt after the other, while there are any;
    the rest            yields one token per T for each decoding sequence.

*Slots.* Sequences beyond ``max_num_seqs`` wait for a slot. If the engine preempts best-effort requests for the shadow's
step gate, the other requests get their slots first.

*Lengths.* A request ends at the output length of the real one, once that has finished. Until then the shadow expects
the mean of the predicted log-normal distribution, exp(mu + sigma^2/2) (`gateway.requests.length_survival`). NOTE: the
median would ignore the few long requests, which hold their slots for the longest time.

*Not modelled.* All sequences decode in every step, whatever the step gate of the shadow's policy. There is no
preemption for lack of KV memory and no client retries. Prefix-cache hits are those predicted for the real request. The
shadow decides at every update, so `Decision.hold_s` has no effect.

A shadow has no clock and no event loop: `gateway.scheduling.shadow_runner` drives it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Literal

from engine_adapter.engine import EngineState
from engine_adapter.gates.best_effort_preemption import reserved_slots
from engine_adapter.gates.composite import GATES
from engine_adapter.gates.slack import SlackGate
from engine_adapter.service_kind import ServiceKind
from gateway.policies.base import Policy
from gateway.requests.request import Request
from gateway.requests.slo import SloClass
from gateway.scheduling.admission import AdmissionController

MAX_TRACKED_REQUESTS = 16_384
"""Most requests that a shadow tracks, about 16 MB. It counts further ones as `unseen`."""

_Z90 = NormalDist().inv_cdf(0.9)

_MIN_STEP_S = 1e-6
"""Avoids division by zero: a configuration may set all step times to 0."""

Decided = Literal["", "admitted", "rejected"]


@dataclass(slots=True, eq=False)
class _Tracked:
    """One request and its progress in the shadow.

    Attributes:
        real: the live request; only read.
        copy: the request that the shadow's policy decides on.
        active, shadow: the decisions of the active policy and of the shadow.
        finished: whether the engine has finished the real request.
        prefill_left_s: remaining prefill time in the shadow (s).
        output_tokens: output so far in the shadow, per sequence.
        mean_tokens: expected output per sequence at arrival.
    """

    real: Request
    copy: Request
    active: Decided = ""
    shadow: Decided = ""
    finished: bool = False
    prefill_left_s: float = 0.0
    output_tokens: float = 0.0
    mean_tokens: float = 0.0

    @property
    def final_tokens(self) -> float:
        """The output length per sequence: of the real request if that has finished, else expected."""
        if self.finished:
            return self.real.generated / self.real.sequences
        return max(self.mean_tokens, self.real.predicted_tokens if self.active == "admitted" else 0.0)


class Shadow:
    """Runs ``policy`` on copies of the requests of one engine. All times are monotonic seconds.

    Attributes:
        name: the label of the shadow in metrics and logs.
        up: False once it was disabled.
        updates: calls of `update`.
        seconds: time spent in its calls (s).
        outcomes: requests by (SLO class, outcome, reason). The outcome is ``admitted`` (reason ``best_effort`` if
            without bounds), ``rejected`` (reasons as in the ledger), ``left`` (the client or the engine was gone before
            the shadow decided) or ``unseen`` (too many tracked requests).
        agreement: requests that both policies decided, by (decision of the active policy, decision of the shadow).
    """

    def __init__(
        self,
        name: str,
        policy: Policy,
        engine: EngineState,
        classes: Mapping[str, SloClass],
        serves_best_effort: Callable[[Request], bool],
        max_tracked: int = MAX_TRACKED_REQUESTS,
    ) -> None:
        self.name = name
        self.up = True
        self.updates = 0
        self.seconds = 0.0
        self.outcomes: Counter[tuple[str, str, str]] = Counter()
        self.agreement: Counter[tuple[str, str]] = Counter()
        self._engine = engine
        self._classes = classes
        self._max_tracked = max_tracked
        self._admission = AdmissionController(policy, replace(engine), serves_best_effort)
        self._tracked: dict[str, _Tracked] = {}
        self._updated_at = 0.0

    @property
    def waiting(self) -> int:
        """Requests that wait in the shadow."""
        return len(self._admission.waiting)

    @property
    def running(self) -> int:
        """Requests that run in the shadow."""
        return len(self._admission.running)

    @property
    def tracked(self) -> int:
        """Requests that the shadow keeps: waiting, running, or not yet decided by the active policy."""
        return len(self._tracked)

    # --- events of the live requests --------------------------------------------------------------------------------

    def submitted(self, request: Request) -> None:
        """Queue a copy of ``request`` as it arrived."""
        if request.id in self._tracked:
            # The engine was lost before it accepted the request, so both policies decide again.
            self._forget(self._tracked[request.id])
        name = request.slo_class
        if len(self._tracked) >= self._max_tracked:
            self.outcomes[name, "unseen", "full"] += 1
            return
        copy = replace(
            request,
            predicted_tokens=request.predicted_at_arrival,
            bounds_waived=False,
            admitted_s=None,
            first_token_s=None,
            generated=0,
            blocks=(),
        )
        tracked = self._tracked[request.id] = _Tracked(request, copy, mean_tokens=_mean_tokens(request))
        if self._admission.waiting.by_class[name] >= self._classes[name].max_waiting:
            self._rejected(tracked, "queue_full")
        else:
            self._admission.submit(copy)

    def admitted(self, request: Request) -> None:
        """Note that the active policy admitted ``request``."""
        tracked = self._tracked.get(request.id)
        if tracked is not None:
            tracked.active = "admitted"
            self._compare(tracked)

    def rejected(self, request: Request) -> None:
        """Note that the active policy rejected ``request``, or that its queue was full."""
        tracked = self._tracked.get(request.id)
        if tracked is not None:
            tracked.active = "rejected"
            self._compare(tracked)

    def withdrawn(self, request: Request) -> None:
        """Forget ``request``: its client disconnected, or the engine was lost, before the active policy decided."""
        tracked = self._tracked.get(request.id)
        if tracked is not None:
            if not tracked.shadow:
                self.outcomes[request.slo_class, "left", ""] += 1
            self._forget(tracked)

    def left(self, request: Request) -> None:
        """Note that the engine has finished ``request``, which fixes its length."""
        tracked = self._tracked.get(request.id)
        if tracked is not None:
            tracked.finished = True

    def engine_lost(self) -> None:
        """End the running set, as the engine did. The waiting queue stays."""
        for copy in list(self._admission.running.values()):
            self._finish(self._tracked[copy.id])

    # --- decisions --------------------------------------------------------------------------------------------------

    def update(self, now: float) -> float | None:
        """Advance the running set to ``now``, then decide. Return when the policy wants to decide again, if it does."""
        self.updates += 1
        self._advance(now)
        admission = self._admission
        if not admission.waiting:
            return None
        admission.engine.handover_s = self._engine.handover_s
        decision = admission.decide(now)
        for copy in decision.admit:
            self._admitted(self._tracked[copy.id])
        for rejection in decision.reject:
            self._rejected(self._tracked[rejection.request.id], f"{rejection.bound}_unattainable")
        return decision.recheck_at

    def disable(self) -> None:
        """Drop all requests; keep the counts. The shadow must not be called again."""
        self.up = False
        self._tracked.clear()
        self._admission.waiting.clear()
        self._admission.running.clear()

    def _admitted(self, tracked: _Tracked) -> None:
        copy = tracked.copy
        self.outcomes[copy.slo_class, "admitted", "best_effort" if copy.bounds_waived else ""] += 1
        tracked.shadow = "admitted"
        tracked.prefill_left_s = self._engine.step_time.prefill(tracked.real.uncached_tokens)
        self._compare(tracked)

    def _rejected(self, tracked: _Tracked, reason: str) -> None:
        self.outcomes[tracked.copy.slo_class, "rejected", reason] += 1
        tracked.shadow = "rejected"
        self._compare(tracked)

    def _compare(self, tracked: _Tracked) -> None:
        """Count the agreement once both policies have decided; then forget a request that does not run here."""
        if tracked.active and tracked.shadow:
            self.agreement[tracked.active, tracked.shadow] += 1
            if tracked.copy.id not in self._admission.running:
                del self._tracked[tracked.copy.id]

    def _finish(self, tracked: _Tracked) -> None:
        """End ``tracked`` in the shadow. It stays tracked until the active policy has decided."""
        self._admission.leave(tracked.copy)
        if tracked.active:
            del self._tracked[tracked.copy.id]

    def _forget(self, tracked: _Tracked) -> None:
        if not self._admission.withdraw(tracked.copy):
            self._admission.leave(tracked.copy)
        del self._tracked[tracked.copy.id]

    # --- estimated progress -----------------------------------------------------------------------------------------

    def _in_slot_order(self) -> Iterable[Request]:
        """Return the running set in the order in which the engine gives it slots."""
        running = self._admission.running.values()
        if not (self._engine.gate.preemptible and GATES[self._admission.policy.gate] is SlackGate):
            return running
        best_effort = [copy for copy in running if copy.kind is ServiceKind.BEST_EFFORT]
        others = [copy for copy in running if copy.kind is not ServiceKind.BEST_EFFORT]
        reserved = reserved_slots(self._engine.max_num_seqs)
        return [*best_effort[:reserved], *others, *best_effort[reserved:]]

    def _advance(self, now: float) -> None:
        """Advance the running set to ``now``, and show its load to the policy as the state of the engine."""
        engine = self._engine
        elapsed_s, self._updated_at = now - self._updated_at, now
        prefilling: list[_Tracked] = []
        decoding: list[_Tracked] = []
        sequences = decoding_sequences = 0
        kv_tokens = decoding_tokens = 0.0
        for copy in self._in_slot_order():
            tracked = self._tracked[copy.id]
            sequences += copy.sequences
            if sequences > engine.max_num_seqs:
                continue
            tokens = copy.length * copy.sequences
            kv_tokens += tokens
            if copy.first_token_s is None:
                prefilling.append(tracked)
            else:
                decoding.append(tracked)
                decoding_sequences += copy.sequences
                decoding_tokens += tokens
        step_s = 0.0
        if decoding_sequences:
            step_s = engine.step_time.itl(decoding_sequences, decoding_tokens / decoding_sequences)
        decode_s = elapsed_s - self._advance_prefills(prefilling, elapsed_s, step_s, now)
        for tracked in _advance_decodes(decoding, decode_s / max(step_s, _MIN_STEP_S)):
            self._finish(tracked)
        self._admission.engine = replace(
            engine,
            engine_running=min(sequences, engine.max_num_seqs),
            engine_waiting=max(0, sequences - engine.max_num_seqs),
            kv_usage=min(1.0, kv_tokens / engine.kv_tokens) if engine.kv_tokens else 0.0,
        )

    def _advance_prefills(self, prefilling: list[_Tracked], elapsed_s: float, step_s: float, now: float) -> float:
        """Spend the prefill share of ``elapsed_s`` on prompts, in order. Return the time that they took (s)."""
        chunk_s = self._engine.step_time.prefill(self._engine.max_num_batched_tokens)
        budget_s = left_s = elapsed_s * chunk_s / max(chunk_s + step_s, _MIN_STEP_S)
        for tracked in prefilling:
            if tracked.prefill_left_s > left_s:
                tracked.prefill_left_s -= left_s
                return budget_s
            left_s -= tracked.prefill_left_s
            tracked.prefill_left_s, tracked.output_tokens = 0.0, 1.0
            tracked.copy.first_token_s, tracked.copy.prompt_tokens = now, tracked.real.prompt_tokens
            tracked.copy.advance(tracked.copy.sequences)
        return budget_s - left_s


def _advance_decodes(decoding: list[_Tracked], steps: float) -> list[_Tracked]:
    """Add ``steps`` tokens to each decoding sequence. Return the requests that reach their final length."""
    finished = []
    for tracked in decoding:
        copy, before = tracked.copy, int(tracked.output_tokens)
        tracked.output_tokens += steps
        if tracked.output_tokens >= tracked.final_tokens:
            finished.append(tracked)
        elif int(tracked.output_tokens) > before:
            copy.advance((int(tracked.output_tokens) - before) * copy.sequences)
    return finished


def _mean_tokens(request: Request) -> float:
    """Return the mean of the predicted output length (tokens per sequence), at most the request's limit."""
    p50, p90 = request.predicted_at_arrival, request.predicted_p90
    sigma = math.log(p90 / p50) / _Z90 if p90 > p50 > 0 else 0.0
    return min(p50 * math.exp(sigma**2 / 2), request.max_tokens)
