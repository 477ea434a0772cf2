"""Sequences that come and go, gates with whims, and stepping a scheduler until nobody is left."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hypothesis import strategies as st

from engine_adapter.simulated_scheduler import Finished, SimulatedScheduler, Step
from engine_adapter.simulated_sequence import SimulatedSequence
from engine_adapter.slack_gate import SlackGate
from engine_adapter.step_gate import CreditGate, Decoding, OpenGate, Paced, StepPlan

LONGEST = 100


class WhimsicalGate:
    """Holds back about half of the batch and caps prompts, by the step's number; every fourth step is open.

    ``yielding``: those without a bound make way for the others.
    """

    def __init__(self, whim: int, yielding: bool = False) -> None:
        self.whim, self.yielding, self.steps = whim, yielding, 0
        self.forgotten: list[str] = []

    def sits_out(self, request_id: str) -> bool:
        return self.steps % 4 != 0 and (self.whim >> (self.steps + sum(request_id.encode())) % 16) & 1 == 1

    def plan(self, now: float, decoding: Sequence[Decoding], prefill_backlog: int) -> StepPlan:
        self.steps += 1
        most = None if self.steps % 4 == 0 else self.whim % 40
        return StepPlan({d.request_id for d in decoding if self.sits_out(d.request_id)}, most)

    def makes_way(self, request: Paced) -> bool:
        return self.yielding and request.tpot_slo_s is None

    def forget(self, request_id: str) -> None:
        self.forgotten.append(request_id)


@dataclass(frozen=True)
class Comes:
    """A sequence, and the step before which it comes, and before which nobody waits for it any more."""

    prompt: int
    output: int
    tpot_s: float | None
    step: int
    leaves: int | None = None


COMERS = st.lists(
    st.builds(
        Comes, st.integers(1, 60), st.integers(1, 40), st.sampled_from([None, 0.03, 0.05, 0.06]), st.integers(0, 30)
    ),
    min_size=1,
    max_size=10,
)
LIMITS = st.fixed_dictionaries(
    {
        "max_num_seqs": st.integers(1, 6),
        "max_num_batched_tokens": st.integers(1, 80),
        "max_model_len": st.just(LONGEST),
        "kv_tokens": st.integers(LONGEST, 260),
    }
)
GATES = st.one_of(
    st.builds(OpenGate),
    st.builds(CreditGate),
    st.builds(SlackGate),
    st.builds(WhimsicalGate, st.integers(0, 2**16 - 1), st.booleans()),
)


def sequences_of(comers: Sequence[Comes]) -> list[SimulatedSequence]:
    return [SimulatedSequence(str(i), c.prompt, c.output, c.tpot_s) for i, c in enumerate(comers)]


def play(
    scheduler: SimulatedScheduler,
    comers: Sequence[Comes],
    look: Callable[[Step], None] = lambda step: None,
    after: Callable[[Step, Finished], None] = lambda step, finished: None,
) -> list[SimulatedSequence]:
    """Step until nobody is left; the sequences in the order of ``comers``. Fails if that takes too long."""
    sequences = sequences_of(comers)
    # A prompt that loses its memory is computed again; each time somebody older got a block, which is a step forward.
    patience = 200 + 20 * sum(s.final_length for s in sequences)
    for number in range(patience):
        for sequence, comes in zip(sequences, comers, strict=True):
            if comes.step == number:
                scheduler.submit(sequence)
            sequence.abandoned = sequence.abandoned or comes.leaves == number
        scheduler.drop_abandoned()
        if number > 30 and not (scheduler.running or scheduler.waiting):
            return sequences
        step = scheduler.plan(float(number))
        look(step)
        after(step, scheduler.finish(step))
    raise AssertionError(f"{scheduler.running + scheduler.waiting} sequences are left after {patience} steps")
