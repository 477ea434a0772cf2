"""What `slack` reckons with: the running set as sums, and the queue as columns.

A decision looks at every waiting request. As columns that costs nanoseconds each, so that ten thousand may wait; and
what does not depend on the engine or the time is kept with the queue (`gateway.requests.waiting_arrays`).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from engine_adapter.engine import EngineState
from engine_adapter.gates.best_effort_preemption import reserved_slots
from engine_adapter.gates.slack import BEST_EFFORT_SHARE, PATIENT_S
from gateway.requests.request import Request
from gateway.requests.waiting_arrays import Floats, WaitingArrays

_SLOWEST_S = 0.9 * PATIENT_S
"""Seconds a token that an end-to-end bound leaves at most: the step gate would take more for no pace at all."""

NO_HURRY_S = 3600.0
"""Seconds a token: the pace of a request that has a deadline for its first token alone. No step could break it, and it
sits out as if it had none; but who was promised something keeps his place, and others make way for him."""

E2E_EASE = 1.5
"""An end-to-end bound is no pace. The one that is left of it is asked for at the door; beside whoever comes later, who
is asked for his own, steps turn out shorter than that. So while it runs a request is planned at so many times its pace:
else the longest answer would hold up all others for as long as it takes, and gain nothing by it."""

_LEAST_CHUNK = 16
"""Tokens. However full the batch, prompts must be at hand when a decode ends."""

_ALL = slice(None)

_ALL_KEPT = 1 << 30
"""Places, where nobody makes way."""


@dataclass(slots=True)
class Load:
    """The running set R.

    ``places``: sequences in the engine, ``unbounded`` of them without a pace to keep. All of these but the ``kept`` who
    came first make way for others, who then have ``yielded`` tokens of ``memory`` more. ``decoding`` counts those that
    take part in a step, one without a pace for the share of steps that is its due (`slack_gate`), and ``length`` sums
    their contexts (tokens): as they are now, since others take their places and begin short; of one that is yet to run,
    its mean. ``strictest`` is P* (s). ``memory`` sums the lengths that they are expected to reach (tokens),
    ``variance`` what that is uncertain by; ``z``: how many standard deviations to allow.
    """

    slots: int = 0
    unbounded: int = 0
    kept: int = 0
    yielded: float = 0.0
    decoding: float = 0.0
    length: float = 0.0
    strictest: float = math.inf
    memory: float = 0.0
    variance: float = 0.0
    z: float = 0.0
    _token_s: float | None = None
    """mu(R), once it was asked for: it is, several times a decision."""

    @classmethod
    def of(cls, running: Collection[Request], memory_risk: float, engine: EngineState | None = None) -> Load:
        """The sums over ``running`` (the oldest first) in ``engine``, if it matters who makes way there.

        Memory may be outgrown with a probability of ``memory_risk``.
        """
        load = cls(z=NormalDist().inv_cdf(1 - memory_risk))
        load.kept = reserved_slots(engine.max_num_seqs) if engine is not None and engine.gate.preemptible else _ALL_KEPT
        load._add(running, [math.inf if r.tpot_slo_s is None or r.best_effort else r.tpot_slo_s for r in running])
        return load

    def _add(self, requests: Collection[Request], paces_s: Sequence[float]) -> None:
        # Each running request comes by in every decision: the loop has no call in it, and its sums are locals.
        slots, unbounded = 0, self.unbounded
        decoding = length = memory = yielded = variance = 0.0
        strictest = self.strictest
        for request, pace_s in zip(requests, paces_s, strict=True):
            sequences, predicted = request.sequences, request.predicted_tokens
            weight: float = sequences
            slots += sequences
            out = request.generated / sequences
            reaches = (request.prompt_tokens + (predicted if predicted - out > 1 else out + 1)) * sequences
            memory += reaches
            if pace_s >= NO_HURRY_S:
                weight *= BEST_EFFORT_SHARE
                if pace_s == math.inf:
                    unbounded += sequences
                    if unbounded > self.kept:
                        yielded += reaches
            elif pace_s < strictest:
                strictest = pace_s
            decoding += weight
            length += (request.prompt_tokens + (out if request.admitted_s is not None else predicted / 2)) * weight
            variance += request.variance
        self.slots += slots
        self.unbounded = unbounded
        self.decoding += decoding
        self.length += length
        self.strictest = strictest
        self.memory += memory
        self.yielded += yielded
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

    def without_who_makes_way(self) -> Load:
        """What one with a pace finds taken, where the others make way
        (`engine_adapter.gates.best_effort_preemption`)."""
        if self.unbounded <= self.kept:
            return self
        return replace(self, slots=self.slots - self.unbounded + self.kept, memory=self.memory - self.yielded)


@dataclass(slots=True)
class Queue:
    """Waiting requests with bounds, in deadline order, and what is reckoned with as columns of shape (n,).

    ``arrays`` are those that do not depend on the decision. ``due``: the deadline, or when patience ends; ``tpot_s``:
    the pace to keep (s, infinite without a bound), and ``eased_s``: once it runs (`E2E_EASE`); ``prefill_s``: mu * p.
    """

    requests: Sequence[Request]
    arrays: WaitingArrays
    due: Floats
    tpot_s: Floats
    eased_s: Floats
    prefill_s: Floats

    @classmethod
    def of(
        cls,
        requests: Sequence[Request],
        prefill_token_s: float,
        max_wait_s: float,
        share: float = 1.0,
        arrays: WaitingArrays | None = None,
    ) -> Queue:
        """The columns of ``requests``, with prompt tokens at ``prefill_token_s``. ``arrays``: where they are at hand.

        ``share`` of a bound is the pace, but for bounds that the step gate takes for none; beside a deadline alone it
        is `NO_HURRY_S`.
        """
        kept = WaitingArrays.of(requests) if arrays is None else arrays
        pace = kept.tpot if share == 1 else np.where(kept.tpot < PATIENT_S, share * kept.tpot, kept.tpot)
        pace = np.where(kept.deadline < math.inf, np.minimum(pace, NO_HURRY_S), pace)
        due = np.minimum(kept.deadline, kept.arrival + max_wait_s)
        return cls(requests, kept, due, pace, pace.copy(), prefill_token_s * kept.prompt)

    def pace_ends(self, now: float, load: Load, prompts: int, share: float, engine: EngineState) -> None:
        """Give those with an end-to-end bound the pace that is left of it, were they to go now, behind ``prompts``.

        Their first token is expected as soon as prefill gets to it, at the latest when it is due; and a pace that the
        step gate would take for none is none that their end could be kept with. Paces are those of
        `Request.pace_after`.
        """
        ends = np.flatnonzero(self.arrays.end < math.inf)
        if not len(ends):
            return
        of = WaitingArrays(*[column[ends] for column in self.arrays])
        fixed_s = load.prefilled_in_s(prompts, 0.0, 0.0, engine)
        first_s = of.deadline
        if fixed_s < math.inf:
            token_s = load.prefilled_in_s(prompts, 1.0, 0.0, engine) - fixed_s
            first_s = np.minimum(now + fixed_s + token_s * of.prompt, of.deadline)
        left_s, others = np.maximum(of.end - first_s, 0.0), np.maximum(of.predicted_at_arrival, 1.0)
        for paces, ease in ((self.tpot_s, 1.0), (self.eased_s, E2E_EASE)):
            pace_s = np.minimum(ease * left_s / others, of.own_tpot)
            paces[ends] = np.minimum(share * pace_s, _SLOWEST_S)

    def only(self, which: NDArray[np.bool_]) -> Queue:
        """Those where ``which`` holds."""
        at = np.flatnonzero(which)
        return Queue(
            [self.requests[one] for one in at.tolist()],
            WaitingArrays(*[column[at] for column in self.arrays]),
            *[column[at] for column in (self.due, self.tpot_s, self.eased_s, self.prefill_s)],
        )

    def decode_alone_s(self, engine: EngineState) -> Floats:
        """Seconds a token in an otherwise idle engine."""
        sequences, length = self.arrays.sequences, self.arrays.length
        return engine.step_time.curve.steps_s(sequences, length * sequences)

    def holds_with(
        self,
        load: Load,
        prompts: int,
        within_s: Floats,
        engine: EngineState,
        at: NDArray[np.intp] | slice = _ALL,
    ) -> NDArray[np.bool_]:
        """For each ``at``, whether the invariant holds with it beside ``load``: what `Load` says of R and one more.

        ``prompts`` tokens are to be prefilled before it, and all of it ``within_s`` (s).
        """
        curve, arrays = engine.step_time.curve, self.arrays
        tpot_s, sequences, prompt = self.tpot_s[at], arrays.sequences[at], arrays.prompt[at]
        in_step = tpot_s < NO_HURRY_S
        weight = np.where(in_step, sequences, BEST_EFFORT_SHARE * sequences)
        strictest = np.minimum(np.where(in_step, tpot_s, math.inf), load.strictest)
        decoding = load.decoding + weight
        step = curve.steps_s(decoding, load.length + arrays.length[at] * weight)
        token = curve.prefill_tokens_s(decoding, engine.max_num_batched_tokens, strictest - step)
        others = prompts + arrays.prompt.sum() - prompt
        full = np.maximum(step, np.minimum(strictest, step + token * others))
        first = full + token * (prompts + prompt) / np.maximum(1 - step / strictest, 1e-12)
        holds = (step <= strictest) & (first <= within_s)
        if engine.kv_tokens > 0:
            taken = np.where(tpot_s < math.inf, load.without_who_makes_way().memory, load.memory)
            memory = taken + sequences * (prompt + np.maximum(arrays.output[at], 1.0))
            holds &= memory + load.z * np.sqrt(load.variance + arrays.variance[at]) <= engine.kv_tokens
        return np.asarray(holds, dtype=np.bool_)

    def cost_s(
        self, prefill_token_s: float, decode_s: float, context_s: float, at: NDArray[np.intp] | slice = _ALL
    ) -> Floats:
        """w_i of each ``at``: seconds of engine time, where a token of context takes ``context_s`` in each decode."""
        arrays = self.arrays
        decodes = arrays.sequences[at] * arrays.output[at]
        return prefill_token_s * arrays.prompt[at] + (decode_s + context_s * arrays.length[at]) * decodes
