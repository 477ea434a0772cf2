"""What `slack` reckons with: the running set as sums, and the queue as columns.

A decision looks at every waiting request. As columns that costs nanoseconds each, so that ten thousand may wait.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import compress
from operator import attrgetter
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from engine_adapter.engine import EngineState
from engine_adapter.make_way import kept_places
from engine_adapter.slack_gate import COURTESY, PATIENT_S
from gateway.request import Request

Floats = NDArray[np.float64]

_SLOWEST_S = 0.9 * PATIENT_S
"""Seconds a token that an end-to-end bound leaves at most: the step gate would take more for no pace at all."""

E2E_EASE = 1.5
"""An end-to-end bound is no pace. The one that is left of it is asked for at the door; beside whoever comes later, who
is asked for his own, steps turn out shorter than that. So while it runs a request is planned at so many times its pace:
else the longest answer would hold up all others for as long as it takes, and gain nothing by it."""

_LEAST_CHUNK = 16
"""Tokens. However full the batch, prompts must be at hand when a decode ends."""

_Z90 = NormalDist().inv_cdf(0.9)


@dataclass(slots=True)
class Load:
    """The running set R.

    ``places``: sequences in the engine, ``unbounded`` of them without a pace to keep, expected to reach a length of
    ``unbounded_memory`` (tokens) in all. ``decoding`` counts those that
    take part in a step, one without a pace for the share of steps that is its due (`slack_gate`), and ``length`` sums
    their contexts (tokens): as they are now, since others take their places and begin short; of one that is yet to run,
    its mean. ``strictest`` is P* (s). ``memory`` sums the lengths that they are expected to reach (tokens),
    ``variance`` what that is uncertain by; ``z``: how many standard deviations to allow.
    """

    places: int = 0
    unbounded: int = 0
    unbounded_memory: float = 0.0
    decoding: float = 0.0
    length: float = 0.0
    strictest: float = math.inf
    memory: float = 0.0
    variance: float = 0.0
    z: float = 0.0
    _token_s: float | None = None
    """mu(R), once it was asked for: it is, several times a decision."""

    @classmethod
    def of(cls, running: Collection[Request], memory_risk: float) -> Load:
        """The sums over ``running``; memory may be outgrown with a probability of ``memory_risk``."""
        load = cls(z=NormalDist().inv_cdf(1 - memory_risk))
        load._add(running, [math.inf if r.tpot_slo_s is None or r.best_effort else r.tpot_slo_s for r in running])
        return load

    def _add(self, requests: Collection[Request], paces_s: Sequence[float]) -> None:
        # Each running request comes by in every decision: the loop has no call in it, and its sums are locals.
        places = unbounded = 0
        decoding = length = memory = unbounded_memory = variance = 0.0
        strictest = self.strictest
        for request, pace_s in zip(requests, paces_s, strict=True):
            sequences, predicted = request.sequences, request.predicted_tokens
            weight: float = sequences
            places += sequences
            out = request.generated / sequences
            reaches = (request.prompt_tokens + (predicted if predicted - out > 1 else out + 1)) * sequences
            memory += reaches
            if pace_s == math.inf:
                unbounded += sequences
                unbounded_memory += reaches
                weight *= COURTESY
            elif pace_s < strictest:
                strictest = pace_s
            decoding += weight
            length += (request.prompt_tokens + (out if request.admitted_s is not None else predicted / 2)) * weight
            doubt = request.predicted_p90 - predicted
            if doubt > 0:
                variance += sequences * (doubt / _Z90) ** 2
        self.places += places
        self.unbounded += unbounded
        self.decoding += decoding
        self.length += length
        self.strictest = strictest
        self.memory += memory
        self.unbounded_memory += unbounded_memory
        self.variance += variance
        self._token_s = None

    def plus(self, request: Request, pace_s: float = math.inf) -> Load:
        """R and one more, which has to keep a pace of ``pace_s``."""
        more = Load(*[getattr(self, name) for name in self.__slots__])
        more._add((request,), (pace_s,))
        return more

    def take(self, more: Load) -> None:
        """Become ``more``."""
        for name in self.__slots__:
            setattr(self, name, getattr(more, name))

    def step_s(self, engine: EngineState) -> float:
        """T(R): seconds of a step in which everybody decodes; 0 when nobody does."""
        return engine.step_time.curve.step_s(self.decoding, self.length)

    def prefill_token_s(self, engine: EngineState) -> float:
        """mu(R): seconds that a prompt token costs in the chunks that fill what R leaves of a step of P* seconds."""
        if self._token_s is None:
            spare_s, most = self.strictest - self.step_s(engine), engine.max_num_batched_tokens
            self._token_s = engine.step_time.curve.prefill_token_s(self.decoding, most, spare_s)
        return self._token_s

    def chunk(self, engine: EngineState) -> float:
        """Prompt tokens that a step of P* seconds has time for beside the decodes; `_LEAST_CHUNK` at least."""
        spare_s, most = self.strictest - self.step_s(engine), engine.max_num_batched_tokens
        if spare_s == math.inf:
            return most
        return min(max(spare_s / max(self.prefill_token_s(engine), 1e-12), _LEAST_CHUNK), most)

    def prefilled_in_s(self, ahead: float, prompt: float, behind: float, engine: EngineState) -> float:
        """Seconds until a prompt is prefilled behind ``ahead`` tokens of others, in the time that decodes leave.

        And a step: the one under way must end first, and the last is shared with ``behind`` tokens that wait. While
        there are so many of others', steps take P*.
        """
        step, token = self.step_s(engine), self.prefill_token_s(engine)
        share = 1 - step / self.strictest
        if share <= 0:
            return math.inf
        return max(step, min(self.strictest, step + token * (ahead + behind))) + token * (ahead + prompt) / share

    def fits_memory(self, engine: EngineState) -> bool:
        """Whether the KV memory suffices (or is not known), but for the risk."""
        if engine.kv_tokens <= 0:
            return True
        return self.memory + self.z * math.sqrt(self.variance) <= engine.kv_tokens

    def without_who_makes_way(self, engine: EngineState) -> Load:
        """What one with a pace finds taken: of places and memory those without keep few (`engine_adapter.make_way`)."""
        leaving = self.unbounded - kept_places(engine.max_num_seqs)
        if not engine.gate.makes_way or leaving <= 0:
            return self
        memory = self.unbounded_memory * leaving / self.unbounded
        return replace(self, places=self.places - leaving, memory=self.memory - memory)


@dataclass(slots=True, frozen=True)
class Queue:
    """Waiting requests with bounds, in deadline order, and what is reckoned with as columns of shape (n,).

    ``deadline``: of the first token (s, infinite without one); ``due``: the same, or when patience ends; ``tpot_s``:
    the pace to keep (s, infinite without a bound), and ``eased_s``: once it runs (`E2E_EASE`); ``sequences``;
    ``length``: mean tokens of context over its life; ``prompt`` and ``tokens``: of predicted output, uncertain by
    ``variance``; ``prefill_s``: mu * p.
    """

    requests: Sequence[Request]
    deadline: Floats
    due: Floats
    tpot_s: Floats
    eased_s: Floats
    sequences: Floats
    length: Floats
    prompt: Floats
    tokens: Floats
    variance: Floats
    prefill_s: Floats

    @classmethod
    def of(cls, requests: Sequence[Request], prefill_token_s: float, patience_s: float, share: float = 1.0) -> Queue:
        """The columns of ``requests``, with prompt tokens at ``prefill_token_s``.

        ``share`` of a bound is the pace, but for bounds that the step gate takes for none.
        """
        deadline = _column(map(attrgetter("deadline_s"), requests))
        arrival = _column(map(attrgetter("arrival_s"), requests))
        prompt = _column(map(attrgetter("prompt_tokens"), requests))
        tokens = _column(map(attrgetter("predicted_tokens"), requests))
        sequences = _column(map(attrgetter("sequences"), requests))
        tpot = _column(math.inf if r.tpot_slo_s is None or r.best_effort else r.tpot_slo_s for r in requests)
        pace = np.where(tpot < PATIENT_S, share * tpot, tpot)
        return cls(
            requests=requests,
            deadline=deadline,
            due=np.minimum(deadline, arrival + patience_s),
            tpot_s=pace,
            eased_s=pace.copy(),
            sequences=sequences,
            length=prompt + tokens / 2,
            prompt=prompt,
            tokens=tokens,
            variance=sequences
            * (np.maximum(_column(map(attrgetter("predicted_p90"), requests)) - tokens, 0.0) / _Z90) ** 2,
            prefill_s=prefill_token_s * prompt,
        )

    def pace_ends(self, now: float, load: Load, prompts: int, share: float, engine: EngineState) -> None:
        """Give those with an end-to-end bound the pace that is left of it, were they to go now, behind ``prompts``.

        Their first token is expected as soon as prefill gets to it, at the latest when it is due; and a pace that the
        step gate would take for none is none that their end could be kept with.
        """
        ends = [at for at, request in enumerate(self.requests) if request.slo.e2e_s is not None]
        if not ends:
            return
        fixed_s = load.prefilled_in_s(prompts, 0.0, 0.0, engine)
        token_s = load.prefilled_in_s(prompts, 1.0, 0.0, engine) - fixed_s if fixed_s < math.inf else math.inf
        for at in ends:
            request = self.requests[at]
            first_s = min(now + fixed_s + token_s * request.prompt_tokens, request.deadline_s)
            self.tpot_s[at] = min(share * request.pace_after(first_s), _SLOWEST_S)
            self.eased_s[at] = min(share * request.pace_after(first_s, E2E_EASE), _SLOWEST_S)

    def only(self, which: NDArray[np.bool_]) -> Queue:
        """Those where ``which`` holds."""
        columns = (getattr(self, name)[which] for name in self.__slots__ if name != "requests")
        return Queue(list(compress(self.requests, which.tolist())), *columns)

    def decode_alone_s(self, engine: EngineState) -> Floats:
        """Seconds a token in an otherwise idle engine."""
        return engine.step_time.curve.steps_s(self.sequences, self.length * self.sequences)

    def holds_with(self, load: Load, prompts: int, within_s: Floats, engine: EngineState) -> NDArray[np.bool_]:
        """For each, whether the invariant holds with it beside ``load``: what `Load` says of R and one more, at once.

        ``prompts`` tokens are to be prefilled before it, and all of it ``within_s`` (s).
        """
        curve, paced = engine.step_time.curve, self.tpot_s < math.inf
        weight = np.where(paced, self.sequences, COURTESY * self.sequences)
        strictest = np.minimum(self.tpot_s, load.strictest)
        decoding = load.decoding + weight
        step = curve.steps_s(decoding, load.length + self.length * weight)
        token = curve.prefill_tokens_s(decoding, engine.max_num_batched_tokens, strictest - step)
        others = prompts + self.prompt.sum() - self.prompt
        full = np.maximum(step, np.minimum(strictest, step + token * others))
        first = full + token * (prompts + self.prompt) / np.maximum(1 - step / strictest, 1e-12)
        holds = (step <= strictest) & (first <= within_s)
        if engine.kv_tokens > 0:
            taken = load.without_who_makes_way(engine).memory
            memory = np.where(paced, taken, load.memory) + self.sequences * (self.prompt + np.maximum(self.tokens, 1.0))
            holds = holds & (memory + load.z * np.sqrt(load.variance + self.variance) <= engine.kv_tokens)
        return np.asarray(holds, dtype=np.bool_)

    def cost_s(self, prefill_token_s: float, decode_s: float, context_s: float) -> Floats:
        """w_i: seconds of engine time, where a token of context takes ``context_s`` in each decode."""
        decodes = self.sequences * self.tokens
        return prefill_token_s * self.prompt + (decode_s + context_s * self.length) * decodes


def _column(values: Iterable[float]) -> Floats:
    return np.fromiter(values, dtype=np.float64)
