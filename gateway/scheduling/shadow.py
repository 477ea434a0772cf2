"""A shadow: a policy that decides nothing, with books of its own on the traffic of the one that does.

Two worlds share one stream of requests. In the real one the active policy admits and rejects; in the shadow's, another
policy does, on copies. A request that waits there may long be through with the engine here, or have been rejected, and
the other way round; and the engine is as busy there as what the shadow admitted makes it. So time is guessed. With B
sequences decoding at mean length L in the shadow's world, T = ITL(B, L), and t_c the prefill time of a full step's
budget, of every second

    share = t_c / (t_c + T)    prefills prompts, one after the other, while there is any,
    the rest / T               tokens come out of each that decodes.

Sequences beyond the engine's ``max_num_seqs`` wait for a place, and those that
`engine_adapter.gates.best_effort_preemption` puts aside for
them do where the policy counts on that. A request is as long as the real one where that has
ended and told, else as long as such requests are on average, exp(mu + sigma^2 / 2) of the log-normal in
`gateway.requests.length_survival`: their median would leave out the few that are long and keep the places.

What is not modelled: the step gate of the shadow's policy (everybody decodes in every step), preemption, prefix caches,
clients that come back after a rejection, and that news waits while a decision stands (`Decision.stands_s`). Without a
clock or an event loop in it: `gateway.scheduling.shadow_runner` drives it.
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

MOST_KNOWN = 16_384
"""Requests in a shadow's books. It is not told of those that come when they are full."""

_Z90 = NormalDist().inv_cdf(0.9)

_LEAST_STEP_S = 1e-6
"""Step times may be configured as 0."""

Decided = Literal["", "admitted", "rejected"]


@dataclass(slots=True, eq=False)
class _Known:
    """One request in both worlds: ``real`` is only read; ``copy`` is what the shadow's policy sees, and may change.

    ``ended``: the engine is through with the real one. In the shadow's world: ``prefill_s`` is left of its prefill, and
    ``tokens`` of output are out per sequence, of ``mean_tokens`` expected at its arrival.
    """

    real: Request
    copy: Request
    active: Decided = ""
    shadow: Decided = ""
    ended: bool = False
    prefill_s: float = 0.0
    tokens: float = 0.0
    mean_tokens: float = 0.0

    @property
    def length(self) -> float:
        """Output tokens per sequence: the real one's where it has ended, else what is to be expected of it."""
        if self.ended:
            return self.real.generated / self.real.sequences
        return max(self.mean_tokens, self.real.predicted_tokens if self.active == "admitted" else 0.0)


class Shadow:
    """``policy`` under ``name`` on copies of what ``engine`` is asked. Times are monotonic seconds.

    ``outcomes`` counts what it decided, by (class, outcome, reason): outcome ``admitted`` (reason ``best_effort`` when
    without its bounds), ``rejected`` (reasons as in the ledger), ``left`` (undecided when the client left, or the
    engine died), ``unseen`` (its books were full). ``agreement`` counts requests that both have decided, by (active's
    decision, its own).
    """

    def __init__(
        self,
        name: str,
        policy: Policy,
        engine: EngineState,
        classes: Mapping[str, SloClass],
        serves_best_effort: Callable[[Request], bool] = lambda request: False,
        most_known: int = MOST_KNOWN,
    ) -> None:
        self.name = name
        self.up = True
        self.looks = 0
        self.seconds = 0.0
        self.outcomes: Counter[tuple[str, str, str]] = Counter()
        self.agreement: Counter[tuple[str, str]] = Counter()
        self._engine = engine
        self._classes = classes
        self._most_known = most_known
        self._admission = AdmissionController(policy, replace(engine), serves_best_effort)
        self._known: dict[str, _Known] = {}
        self._looked_at = 0.0

    @property
    def waiting(self) -> int:
        """Requests that wait in its world."""
        return len(self._admission.waiting)

    @property
    def running(self) -> int:
        """Requests that run in its world."""
        return len(self._admission.running)

    # --- what happens in the real world ---------------------------------------------------------------------------

    def submitted(self, request: Request) -> None:
        """``request`` came in; neither world has decided."""
        if request.id in self._known:
            # The engine was gone before it took the request: both decide anew.
            self._drop(self._known[request.id])
        name = request.slo_class
        if len(self._known) >= self._most_known:
            self.outcomes[name, "unseen", "full"] += 1
            return
        copy = replace(
            request,
            predicted_tokens=request.predicted_at_arrival,
            best_effort=False,
            admitted_s=None,
            first_token_s=None,
            generated=0,
        )
        known = self._known[request.id] = _Known(request, copy, mean_tokens=_mean_tokens(request))
        if self._admission.waiting.by_class[name] >= self._classes[name].max_waiting:
            self._rejected(known, "queue_full")
        else:
            self._admission.submit(copy)

    def admitted(self, request: Request) -> None:
        """The active policy admitted ``request``."""
        known = self._known.get(request.id)
        if known is not None:
            known.active = "admitted"
            self._settle(known)

    def rejected(self, request: Request) -> None:
        """The active policy rejected ``request``, or its queue was full."""
        known = self._known.get(request.id)
        if known is not None:
            known.active = "rejected"
            self._settle(known)

    def withdrawn(self, request: Request) -> None:
        """The client left, or the gateway could not wait for the engine, before the active policy decided."""
        known = self._known.get(request.id)
        if known is not None:
            if not known.shadow:
                self.outcomes[request.slo_class, "left", ""] += 1
            self._drop(known)

    def left(self, request: Request) -> None:
        """The engine is through with ``request``, however it ended: so long it was."""
        known = self._known.get(request.id)
        if known is not None:
            known.ended = True

    def engine_lost(self) -> None:
        """The engine died, and what ran in it. What waits waits on."""
        for copy in list(self._admission.running.values()):
            self._ends(self._known[copy.id])

    # --- what it makes of it ----------------------------------------------------------------------------------------

    def look(self, now: float) -> float | None:
        """Let what runs come along, then decide; when to look again at the latest, as the policy wants it."""
        self.looks += 1
        self._come_along(now)
        admission = self._admission
        if not admission.waiting:
            return None
        decision = admission.decide(now)
        for copy in decision.admit:
            self._admitted(self._known[copy.id])
        for rejection in decision.reject:
            self._rejected(self._known[rejection.request.id], f"{rejection.bound}_unattainable")
        return decision.recheck_at

    def switch_off(self) -> None:
        """It failed: it decides no more and forgets its books. What it counted stays."""
        self.up = False
        self._known.clear()
        self._admission.waiting.clear()
        self._admission.running.clear()

    def _admitted(self, known: _Known) -> None:
        copy = known.copy
        self.outcomes[copy.slo_class, "admitted", "best_effort" if copy.best_effort else ""] += 1
        known.shadow = "admitted"
        known.prefill_s = self._engine.step_time.prefill(known.real.prompt_tokens)
        self._settle(known)

    def _rejected(self, known: _Known, reason: str) -> None:
        self.outcomes[known.copy.slo_class, "rejected", reason] += 1
        known.shadow = "rejected"
        self._settle(known)

    def _settle(self, known: _Known) -> None:
        """Once both have decided, say whether they agree; what then runs nowhere here is forgotten."""
        if known.active and known.shadow:
            self.agreement[known.active, known.shadow] += 1
            if known.copy.id not in self._admission.running:
                del self._known[known.copy.id]

    def _ends(self, known: _Known) -> None:
        """In the shadow's world. The active policy may still have to decide."""
        self._admission.leave(known.copy)
        if known.active:
            del self._known[known.copy.id]

    def _drop(self, known: _Known) -> None:
        if not self._admission.withdraw(known.copy):
            self._admission.leave(known.copy)
        del self._known[known.copy.id]

    # --- time passes ------------------------------------------------------------------------------------------------

    def _places_first(self) -> Iterable[Request]:
        """What was admitted: first who has a place."""
        running = self._admission.running.values()
        if not (self._engine.gate.preemptible and GATES[self._admission.policy.gate] is SlackGate):
            return running
        others = [copy for copy in running if copy.kind is ServiceKind.BEST_EFFORT]
        paced = [copy for copy in running if copy.kind is not ServiceKind.BEST_EFFORT]
        kept = reserved_slots(self._engine.max_num_seqs)
        return [*others[:kept], *paced, *others[kept:]]

    def _come_along(self, now: float) -> None:
        """Bring what runs to ``now``, and what the policy is shown of the engine with it."""
        engine = self._engine
        elapsed, self._looked_at = now - self._looked_at, now
        prefilling: list[_Known] = []
        decoding: list[_Known] = []
        sequences = decodes = 0
        kept = decoded = 0.0
        for copy in self._places_first():
            known = self._known[copy.id]
            sequences += copy.sequences
            if sequences > engine.max_num_seqs:
                continue
            tokens = copy.length * copy.sequences
            kept += tokens
            if copy.first_token_s is None:
                prefilling.append(known)
            else:
                decoding.append(known)
                decodes += copy.sequences
                decoded += tokens
        step_s = engine.step_time.itl(decodes, decoded / decodes) if decodes else 0.0
        left_s = elapsed - self._prefill(prefilling, elapsed, step_s, now)
        for known in _decode(decoding, left_s / max(step_s, _LEAST_STEP_S)):
            self._ends(known)
        self._admission.engine = replace(
            engine,
            engine_running=min(sequences, engine.max_num_seqs),
            engine_waiting=max(0, sequences - engine.max_num_seqs),
            kv_usage=min(1.0, kept / engine.kv_tokens) if engine.kv_tokens else 0.0,
        )

    def _prefill(self, prefilling: list[_Known], elapsed_s: float, step_s: float, now: float) -> float:
        """Guess the prefills of ``elapsed_s``; how much of it (s) they took."""
        chunk_s = self._engine.step_time.prefill(self._engine.max_num_batched_tokens)
        budget_s = left_s = elapsed_s * chunk_s / max(chunk_s + step_s, _LEAST_STEP_S)
        for known in prefilling:
            if known.prefill_s > left_s:
                known.prefill_s -= left_s
                return budget_s
            left_s -= known.prefill_s
            known.prefill_s, known.tokens = 0.0, 1.0
            known.copy.first_token_s, known.copy.prompt_tokens = now, known.real.prompt_tokens
            known.copy.advance(known.copy.sequences)
        return budget_s - left_s


def _decode(decoding: list[_Known], steps: float) -> list[_Known]:
    """Guess the tokens of so many ``steps``; who is done by them."""
    done = []
    for known in decoding:
        copy, before = known.copy, int(known.tokens)
        known.tokens += steps
        if known.tokens >= known.length:
            done.append(known)
        elif int(known.tokens) > before:
            copy.advance((int(known.tokens) - before) * copy.sequences)
    return done


def _mean_tokens(request: Request) -> float:
    """The mean output length (tokens per sequence) of requests of which the same is predicted, within their limit."""
    p50, p90 = request.predicted_at_arrival, request.predicted_p90
    sigma = math.log(p90 / p50) / _Z90 if p90 > p50 > 0 else 0.0
    return min(p50 * math.exp(sigma**2 / 2), request.max_tokens)
