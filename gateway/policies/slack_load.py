"""What `slack` reckons with: the running set as sums, and the queue as columns.

A decision looks at every waiting request. As columns that costs nanoseconds each, so that ten thousand may wait.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import compress
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from engine_adapter.slack_gate import COURTESY
from engine_adapter.step_time import StepTimes
from gateway.request import Request

Floats = NDArray[np.float64]

_Z90 = NormalDist().inv_cdf(0.9)


@dataclass(slots=True)
class Load:
    """The running set R.

    ``places``: sequences in the engine, ``unbounded`` of them without a pace to keep. ``decoding`` counts those that
    take part in a step, one without a pace for the share of steps that is its due (`slack_gate`), and ``length`` sums
    their contexts (tokens): as they are now, since others take their places and begin short; of one that is yet to run,
    its mean. ``prefill`` is what their places need of prompts per step (tokens): p_i / y_i each, as whoever is through
    after y_i steps is followed by another. ``strictest`` is P* (s). ``memory`` sums the lengths that they are expected
    to reach (tokens), ``variance`` what that is uncertain by; ``z``: how many standard deviations to allow.
    """

    places: int = 0
    unbounded: int = 0
    decoding: float = 0.0
    length: float = 0.0
    prefill: float = 0.0
    strictest: float = math.inf
    memory: float = 0.0
    variance: float = 0.0
    z: float = 0.0

    @classmethod
    def of(cls, running: Collection[Request], memory_risk: float) -> Load:
        """The sums over ``running``; memory may be outgrown with a probability of ``memory_risk``."""
        load = cls(z=NormalDist().inv_cdf(1 - memory_risk))
        for request in running:
            load._add(request)
        return load

    def _add(self, request: Request) -> None:
        sequences, predicted = request.sequences, request.predicted_tokens
        bound = request.tpot_slo_s
        weight: float = sequences
        self.places += sequences
        if bound is None or request.best_effort:
            self.unbounded += sequences
            weight *= COURTESY
        elif bound < self.strictest:
            self.strictest = bound
        out = request.generated / sequences
        left = predicted - out
        self.decoding += weight
        self.length += (request.prompt_tokens + (out if request.admitted_s is not None else predicted / 2)) * weight
        self.prefill += request.prompt_tokens / (predicted if predicted > 1 else 1.0) * weight
        self.memory += (request.prompt_tokens + (predicted if left > 1 else out + 1)) * sequences
        doubt = request.predicted_p90 - predicted
        if doubt > 0:
            self.variance += sequences * (doubt / _Z90) ** 2

    def plus(self, request: Request) -> Load:
        """R and one more."""
        more = Load(
            self.places,
            self.unbounded,
            self.decoding,
            self.length,
            self.prefill,
            self.strictest,
            self.memory,
            self.variance,
            self.z,
        )
        more._add(request)
        return more

    def take(self, more: Load) -> None:
        """Become ``more``."""
        for name in self.__slots__:
            setattr(self, name, getattr(more, name))

    def step_s(self, times: StepTimes) -> float:
        """T(R): seconds of a step in which everybody decodes; 0 when nobody does."""
        return times.itl(self.decoding, self.length / self.decoding) if self.decoding else 0.0

    def pace_s(self, times: StepTimes) -> float:
        """T(R) + A(R): seconds a token in the long run, prompts included."""
        return self.step_s(times) + times.alpha * self.prefill

    def fits_memory(self, kv_tokens: int) -> bool:
        """Whether ``kv_tokens`` (0: not known) suffice, but for the risk. One request always fits."""
        if kv_tokens <= 0 or self.places <= 1:
            return True
        return self.memory + self.z * math.sqrt(self.variance) <= kv_tokens


@dataclass(slots=True, frozen=True)
class Queue:
    """Waiting requests with bounds, in deadline order, and what is reckoned with as columns of shape (n,).

    ``deadline``: of the first token (s, infinite without one); ``due``: the same, or when patience ends; ``tpot_s``:
    bound (s, infinite without one); ``sequences``; ``length``: mean tokens of context over its life; ``tokens``:
    predicted output; ``prefill_s``: t(p) at the margin.
    """

    requests: Sequence[Request]
    deadline: Floats
    due: Floats
    tpot_s: Floats
    sequences: Floats
    length: Floats
    tokens: Floats
    prefill_s: Floats

    @classmethod
    def of(cls, requests: Sequence[Request], times: StepTimes, patience_s: float) -> Queue:
        """The columns of ``requests``."""
        deadline = _column(r.deadline_s for r in requests)
        arrival = _column(r.arrival_s for r in requests)
        prompt = _column(r.prompt_tokens for r in requests)
        tokens = _column(r.predicted_tokens for r in requests)
        return cls(
            requests=requests,
            deadline=deadline,
            due=np.minimum(deadline, arrival + patience_s),
            tpot_s=_column(math.inf if r.tpot_slo_s is None or r.best_effort else r.tpot_slo_s for r in requests),
            sequences=_column(r.sequences for r in requests),
            length=prompt + tokens / 2,
            tokens=tokens,
            prefill_s=times.alpha * prompt,
        )

    def only(self, which: NDArray[np.bool_]) -> Queue:
        """Those where ``which`` holds."""
        columns = (self.deadline, self.due, self.tpot_s, self.sequences, self.length, self.tokens, self.prefill_s)
        return Queue(list(compress(self.requests, which.tolist())), *(column[which] for column in columns))

    def decode_alone_s(self, times: StepTimes) -> Floats:
        """Seconds a token in an otherwise idle engine."""
        return _step_s(self.sequences, self.length * self.sequences, times)

    def pace_s_with(self, load: Load, times: StepTimes) -> Floats:
        """T(R) + A(R) for each, were it admitted."""
        weight = np.where(self.tpot_s < math.inf, self.sequences, COURTESY * self.sequences)
        decodes = _step_s(load.decoding + weight, load.length + self.length * weight, times)
        prefill = times.alpha * load.prefill + self.prefill_s / np.maximum(self.tokens, 1.0) * weight
        return np.asarray(decodes + prefill, dtype=np.float64)

    def cost_s(self, times: StepTimes) -> Floats:
        """w_i: seconds of engine time, at the margin."""
        return self.sequences * (self.prefill_s + self.tokens * (times.b + times.a * self.length))


def _column(values: Iterable[float]) -> Floats:
    return np.fromiter(values, dtype=np.float64)


def _step_s(decoding: Floats, length: Floats, times: StepTimes) -> Floats:
    """`StepTimes.itl` over columns: ``decoding`` sequences with contexts that sum to ``length``."""
    return times.a * length + times.c * length / decoding + times.b * decoding + times.d
