"""All requests of one engine as one batch, by which a router compares engines, and the prefill work among them."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import NamedTuple

from engine_adapter.engine import EngineState
from engine_adapter.service_kind import ServiceKind
from gateway.policies.running_batch import RunningBatch
from gateway.requests.request import Request

_YIELDING = ServiceKind.YIELDING

MAX_AGE_S = 0.25
"""Seconds after which the sums are made again at the latest, because running requests grow meanwhile.

On an A100 these are about 10 steps, so contexts of about 500 tokens are at most 2% too short. Prompt times are as old:
the step-time model may have been refitted since.
"""


class _Prompt(NamedTuple):
    """What a prompt adds to `backlog` and ``prefill_s``, and takes from `memory`: what is cached may change later."""

    tokens: int
    seconds: float
    shared: int


_NONE = _Prompt(0, 0.0, 0)


class ExpectedBatch(RunningBatch):
    """The running and waiting requests of ``engine``, as sums that follow arrivals, admissions, begins and ends.

    A sum over all requests costs more than comparing an engine, and a change concerns one request of hundreds. So the
    sums are adjusted by that one. `preemptible_memory` is not: its requests depend on their order. Once the sums do not
    hold any more, the batch is ``outdated``. At ``until_s`` (monotonic s) they are too old.

    Unlike a running set, it has what others than this gateway have on the engine: a router looks for a better engine.

    ``prefill_s``: seconds of prefill work: the sum of t(p) of the uncached prompts that are not prefilled yet (SCORPIO
    eq. 6). Unlike `backlog`, it has the prompts of yielding requests too.
    """

    def __init__(
        self, running: Collection[Request], waiting: Collection[Request], engine: EngineState, until_s: float
    ) -> None:
        self.until_s = until_s
        self.outdated = False
        self._strictest = 0
        """Requests that have the strictest pace."""
        self.prefill_s = 0.0
        self._prompts: dict[str, _Prompt] = {}
        self._shared = engine.shared_tokens
        super().__init__((), engine)
        self.slots += engine.foreign_sequences
        self.memory += engine.foreign_tokens
        self.add(running)
        self.add(waiting)

    def add(self, requests: Collection[Request], pace_s: float | None = None) -> None:
        """Add requests, each with its own pace."""
        before_s = self.strictest_s
        super().add(requests, pace_s)
        strictest_s, step_tokens, paced = self.strictest_s, self.engine.tokens_per_step, ServiceKind.PACED
        count = self._strictest if strictest_s == before_s else 0
        for request in requests:
            if request.first_token_s is None and not request.unobserved:
                self._prompts[request.id] = prompt = self._prompt(request)
                self.prefill_s += prompt.seconds
            if request.kind is paced and request.pace_s is not None and request.pace_s * step_tokens == strictest_s:
                count += 1
        self._strictest = count

    def begin(self, request: Request) -> None:
        """Note that the answer of ``request`` began, so its prompt is computed."""
        prompt = self._prompts.pop(request.id, _NONE)
        self.backlog -= prompt.tokens
        self.prefill_s = self.prefill_s - prompt.seconds if self._prompts else 0.0

    def recount(self, request: Request) -> None:
        """Note that another part of the prompt of ``request``, which waits, is cached now."""
        before = self._prompts.get(request.id)
        if before is not None:
            self._prompts[request.id] = after = self._prompt(request)
            self.backlog += after.tokens - before.tokens
            self.prefill_s += after.seconds - before.seconds
            self.memory += before.shared - after.shared

    def share(self, tokens: int) -> None:
        """Note that the running requests share ``tokens`` of KV memory now."""
        self.memory += self._shared - tokens
        self._shared = tokens

    def _prompt(self, request: Request) -> _Prompt:
        tokens = request.uncached_tokens
        counted = tokens if request.kind is not _YIELDING or self.beside_yielding else 0
        return _Prompt(counted, self.engine.step_time.prefill(tokens), request.shared_tokens)

    def remove(self, request: Request) -> None:
        """Remove ``request`` at the length that it has now."""
        if self.outdated:
            return
        self.begin(request)
        own, engine = RunningBatch((request,), self.engine), self.engine
        decodes, tokens = engine.foreign_decodes, engine.foreign_tokens if engine.foreign_decodes else 0.0
        self.slots -= own.slots
        self.best_effort_slots -= own.best_effort_slots
        # Every batch has the foreign decodes, and less memory by what its engine's requests share.
        self.decoding = max(0.0, self.decoding - (own.decoding - decodes))
        self.context = max(0.0, self.context - (own.context - tokens))
        self.memory -= own.memory + engine.shared_tokens
        if own.strictest_s <= self.strictest_s < math.inf:
            self._strictest -= 1
            self.outdated |= self._strictest <= 0
        super().add(())
