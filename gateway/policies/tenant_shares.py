"""Max-min fairness between the tenants of one engine: what a tenant uses above its share gives way to the others.

A tenant uses a share of the engine's time, of its KV memory and of its slots. The largest of the three is its *usage*.
Time includes its decodes, its recent prompts, and the extra cost of short steps that a strict pace causes. Usage is
computed from the running requests, so a wrong length hint does not affect it. A tenant is *above its share* while it
uses more than its weight's part of what all active tenants use.

A tenant within its share is served as if the tenants above theirs were not there. These get what it leaves: their
requests are admitted as `ServiceKind.YIELDING`. So a tenant that asks for less than its share gets all of it, and
tenants that ask for more get equal parts by weight. While one tenant alone is active, it may use the whole engine.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from gateway.policies.running_batch import RunningBatch
from gateway.requests.request import Request

MEMORY_S = 10.0
"""Seconds in which the memory of past prompts fades by a factor of e: about as long as an answer takes. Convention."""

FIXED_PART = 0.4
"""Part of each step that may be its fixed cost. A pace that makes it larger counts as usage, by what is above. Measured
in points that the victim loses: without, 7 beside bounds of 20 ms; with 0.33, 6 beside long prompts; with 0.5, 3."""

MAX_TENANTS = 1000
"""Most recent tenants that are remembered. Bounds memory."""


@dataclass(slots=True)
class _Recent:
    """When a tenant last got a request in (s), its weight, and the engine time of its prompts (s, fading)."""

    at: float
    weight: float
    prefill_s: float = 0.0


@dataclass(slots=True)
class _Used:
    """Use of a tenant: s of a step, share of time for prompts, tokens of KV memory, slots. Its strictest pace (s)."""

    weight: float
    decode_s: float = 0.0
    prompts: float = 0.0
    memory: float = 0.0
    slots: int = 0
    pace_s: float = math.inf
    share: float = 0.0


@dataclass(slots=True)
class TenantShares:
    """The tenants that were active lately on one engine. All times are monotonic seconds."""

    _recent: dict[str, _Recent] = field(default_factory=dict)

    def note(self, now: float, admitted: Iterable[Request], token_s: float) -> None:
        """Count ``admitted`` requests, whose prompts take ``token_s`` per token."""
        for request in admitted:
            recent = self._recent.pop(request.tenant, None) or _Recent(now, request.weight)
            faded = recent.prefill_s * math.exp((recent.at - now) / MEMORY_S)
            recent.at, recent.weight, recent.prefill_s = now, request.weight, faded + token_s * request.uncached_tokens
            self._recent[request.tenant] = recent
            if len(self._recent) > MAX_TENANTS:
                del self._recent[next(iter(self._recent))]

    def several(self, now: float, waiting: Mapping[str, float]) -> bool:
        """Return whether several tenants wait (``waiting``: weights) or were active lately; forgets the others."""
        while len(self._recent) > 1 and next(iter(self._recent.values())).at < now - MEMORY_S:
            del self._recent[next(iter(self._recent))]
        return len(self._recent) > 1 or len(self._recent.keys() | waiting.keys()) > 1

    def above(
        self, now: float, waiting: Mapping[str, float], running: Iterable[Request], batch: RunningBatch
    ) -> tuple[set[str], float]:
        """Return the tenants above their share, and the share of recent time that the prompts of the others took.

        ``waiting``: the weights of the tenants that wait. ``batch``: the running set, as they see it. While one tenant
        alone is active, none is above its share.
        """
        if not self.several(now, waiting):
            return set(), 0.0
        engine, token_s, context_s = batch.engine, batch.prefill_token_s, batch.engine.step_time.curve.a
        used = {name: _Used(weight) for name, weight in waiting.items()}
        for name, recent in self._recent.items():
            of = used.setdefault(name, _Used(recent.weight))
            of.prompts = recent.prefill_s * math.exp((recent.at - now) / MEMORY_S) / MEMORY_S
        for request in running:
            of = used.get(request.tenant) or used.setdefault(request.tenant, _Used(request.weight))
            length = request.length
            of.decode_s += request.sequences * (token_s + context_s * length)
            of.memory += request.sequences * length
            if request.pace_s is not None:
                of.pace_s = min(of.pace_s, request.pace_s * engine.tokens_per_step)
            of.slots += request.sequences
        alone_s = engine.step_time.curve.step_s(1, 0)
        pace_s = max(batch.strictest_s if batch.strictest_s < math.inf else batch.step_s, 2 * alone_s)
        for of in used.values():
            strict = max(alone_s / of.pace_s - FIXED_PART, 0.0)
            time = (of.decode_s / max(min(of.pace_s, pace_s), alone_s) + of.prompts + strict) / (1 - alone_s / pace_s)
            memory = of.memory / engine.kv_tokens if engine.kv_tokens > 0 else 0.0
            of.share = max(time, memory, of.slots / engine.max_num_seqs)
        level = sum([of.share for of in used.values()]) / sum([of.weight for of in used.values()])
        above = {name for name, of in used.items() if of.share > level * of.weight}
        return above, sum([of.prompts for name, of in used.items() if name not in above])
