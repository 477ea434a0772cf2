"""The simulated engines' scheduler keeps vLLM's limits and loses no token."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_adapter.gates.base import CreditGate, Decoding, OpenGate, StepPlan
from engine_adapter.simulated.scheduler import BLOCK_TOKENS, STEP_MODES, Finished, SimulatedScheduler, Step
from engine_adapter.simulated.sequence import SimulatedSequence
from tests.fixtures.scheduler_play import COMERS, GATES, LIMITS, LONGEST, Comes, WhimsicalGate, play

MODES = st.sampled_from(STEP_MODES)
WIDE = {"max_num_seqs": 8, "max_num_batched_tokens": 1000, "max_model_len": LONGEST, "kv_tokens": 10_000}


def held_blocks(scheduler: SimulatedScheduler) -> int:
    return sum(s.capacity for s in scheduler.sequences()) // BLOCK_TOKENS


# --- what holds in every step -----------------------------------------------------------------------------------------


@given(COMERS, LIMITS, GATES, MODES)
def test_no_step_exceeds_the_token_budget_or_the_batch(
    comers: list[Comes], limits: dict[str, int], gate: Any, mode: str
) -> None:
    scheduler = SimulatedScheduler(**limits, gate=gate, step_mode=mode)

    def look(step: Step) -> None:
        chunks = [tokens for _, tokens in step.chunks]
        assert step.prefill_tokens == sum(chunks)
        assert all(tokens > 0 for tokens in chunks)
        alone = mode == "prefill-first" and len(chunks) == 1  # a prompt longer than the budget goes by itself
        assert alone or len(step.decodes) + sum(chunks) <= limits["max_num_batched_tokens"]
        assert scheduler.running <= limits["max_num_seqs"]

    play(scheduler, comers, look)


@given(COMERS, LIMITS, GATES, MODES)
def test_kv_blocks_are_either_free_or_held_and_hold_what_is_computed(
    comers: list[Comes], limits: dict[str, int], gate: Any, mode: str
) -> None:
    scheduler = SimulatedScheduler(**limits, gate=gate, step_mode=mode)
    blocks = -(-limits["kv_tokens"] // BLOCK_TOKENS)

    def look(step: Step) -> None:
        assert 0 <= held_blocks(scheduler) <= blocks
        assert scheduler.kv_usage == pytest.approx(held_blocks(scheduler) / blocks)
        assert all(s.capacity >= s.length for s in step.decodes)
        assert all(s.capacity >= s.prefilled + tokens for s, tokens in step.chunks)
        assert step.decode_context == sum(s.length for s in step.decodes)
        assert step.prefill_context == sum(s.prefilled for s, _ in step.chunks)

    play(scheduler, comers, look)
    assert scheduler.kv_usage == 0


@given(COMERS, LIMITS, GATES, MODES)
def test_every_sequence_ends_with_exactly_its_tokens_however_often_it_was_preempted(
    comers: list[Comes], limits: dict[str, int], gate: Any, mode: str
) -> None:
    scheduler = SimulatedScheduler(**limits, gate=gate, step_mode=mode)
    tokens: Counter[str] = Counter()
    ended: list[str] = []

    def after(step: Step, finished: Finished) -> None:
        tokens.update(s.request_id for s in (*step.decodes, *finished.prefilled))
        ended.extend(s.request_id for s in finished.done)

    sequences = play(scheduler, comers, after=after)
    assert sorted(ended) == sorted(s.request_id for s in sequences)
    assert [tokens[s.request_id] for s in sequences] == [c.output for c in comers]
    assert [s.generated for s in sequences] == [c.output for c in comers]
    assert scheduler.preemptions == sum(s.preemptions for s in sequences)


@given(COMERS, LIMITS, GATES, MODES)
def test_prompts_are_begun_first_come_first_served_among_those_who_make_way_and_among_the_others(
    comers: list[Comes], limits: dict[str, int], gate: Any, mode: str
) -> None:
    begun: dict[SimulatedSequence, None] = {}
    play(
        SimulatedScheduler(**limits, gate=gate, step_mode=mode),
        comers,
        lambda step: begun.update(dict.fromkeys(s for s, _ in step.chunks)),
    )
    for preemptible in (False, True):
        of_a_kind = [int(s.request_id) for s in begun if s.preemptible == preemptible]
        assert of_a_kind == sorted(of_a_kind, key=lambda i: (comers[i].step, i))
    assert len(begun) == len(comers)


@given(COMERS, LIMITS, GATES, MODES)
def test_who_the_gate_holds_back_does_not_decode(
    comers: list[Comes], limits: dict[str, int], gate: Any, mode: str
) -> None:
    def look(step: Step) -> None:
        assert not step.sat_out & {s.request_id for s in step.decodes}

    play(SimulatedScheduler(**limits, gate=gate, step_mode=mode), comers, look)


@given(COMERS, LIMITS, GATES)
def test_in_prefill_first_steps_prompts_are_whole_and_nobody_decodes_beside_them(
    comers: list[Comes], limits: dict[str, int], gate: Any
) -> None:
    def look(step: Step) -> None:
        assert not (step.decodes and step.chunks)
        assert all((s.prefilled, tokens) == (0, s.to_prefill) for s, tokens in step.chunks)

    play(SimulatedScheduler(**limits, gate=gate, step_mode="prefill-first"), comers, look)


LEAVING = COMERS.flatmap(
    lambda comers: st.lists(st.none() | st.integers(0, 60), min_size=len(comers), max_size=len(comers)).map(
        lambda leaves: [Comes(c.prompt, c.output, c.tpot_s, c.step, at) for c, at in zip(comers, leaves, strict=True)]
    )
)


@given(LEAVING, LIMITS, GATES, MODES)
def test_whoever_is_abandoned_leaves_with_their_memory_and_everybody_else_finishes(
    comers: list[Comes], limits: dict[str, int], gate: Any, mode: str
) -> None:
    scheduler = SimulatedScheduler(**limits, gate=gate, step_mode=mode)

    def look(step: Step) -> None:
        assert not any(s.abandoned for s in (*step.decodes, *(s for s, _ in step.chunks)))
        blocks = -(-limits["kv_tokens"] // BLOCK_TOKENS)
        assert scheduler.kv_usage == pytest.approx(held_blocks(scheduler) / blocks)

    sequences = play(scheduler, comers, look)
    assert all(s.abandoned or s.generated == s.output_tokens for s in sequences)
    assert scheduler.kv_usage == 0


# --- by example -------------------------------------------------------------------------------------------------------


def submitted(*sequences: SimulatedSequence, **limits: Any) -> SimulatedScheduler:
    scheduler = SimulatedScheduler(**{**WIDE, **limits})
    for sequence in sequences:
        scheduler.submit(sequence)
    return scheduler


def stepped(scheduler: SimulatedScheduler, steps: int = 1) -> list[tuple[list[str], dict[str, int]]]:
    """Who decoded, and the chunks, of each of the next steps."""
    seen = []
    for _ in range(steps):
        step = scheduler.plan(0.0)
        seen.append(([s.request_id for s in step.decodes], {s.request_id: tokens for s, tokens in step.chunks}))
        scheduler.finish(step)
    return seen


def test_decodes_go_first_and_prompts_get_the_rest_cut_where_the_budget_ends() -> None:
    scheduler = submitted(SimulatedSequence("a", 30, 9), max_num_batched_tokens=40)
    stepped(scheduler)
    for name in ("b", "c"):
        scheduler.submit(SimulatedSequence(name, 50, 9))
    assert stepped(scheduler, 3) == [
        (["a"], {"b": 39}),
        (["a"], {"b": 11, "c": 28}),
        (["a", "b"], {"c": 22}),
    ]


def test_prefill_first_lets_decodes_wait_for_every_prompt_that_fits() -> None:
    scheduler = submitted(SimulatedSequence("a", 30, 9), max_num_batched_tokens=60, step_mode="prefill-first")
    stepped(scheduler)
    for name, prompt in (("b", 50), ("c", 10), ("d", 90)):
        scheduler.submit(SimulatedSequence(name, prompt, 2))
    assert stepped(scheduler, 4) == [
        ([], {"b": 50, "c": 10}),
        ([], {"d": 90}),
        (["a", "b", "c", "d"], {}),
        (["a"], {}),
    ]


def test_the_youngest_gives_way_and_is_computed_again_with_what_it_had() -> None:
    # Four blocks: two each; the older one's 33rd token needs a fifth.
    old, young = SimulatedSequence("old", 30, 20), SimulatedSequence("young", 28, 20)
    scheduler = submitted(old, young, max_model_len=64, kv_tokens=64)
    assert stepped(scheduler, 3)[1:] == [(["old", "young"], {})] * 2
    assert (old.length, young.length) == (33, 31)
    assert stepped(scheduler) == [(["old"], {})]
    assert (young.preemptions, young.to_prefill, young.prefilled, young.capacity) == (1, 31, 0, 0)
    assert (scheduler.running, scheduler.waiting, scheduler.preemptions) == (1, 1, 1)
    until_it_fits = stepped(scheduler, 17)
    assert until_it_fits[-1] == ([], {"young": 31})
    assert young.generated == 4, "the step that recomputes also gives the next token"


def test_nobody_is_admitted_in_a_step_that_had_to_preempt() -> None:
    scheduler = submitted(SimulatedSequence("old", 32, 20), SimulatedSequence("young", 32, 20), kv_tokens=64,
                          max_model_len=64)  # fmt: skip
    stepped(scheduler)
    scheduler.submit(SimulatedSequence("tiny", 1, 1))
    assert stepped(scheduler) == [(["old"], {})]
    assert [s.request_id for s in scheduler.sequences()] == ["old", "young", "tiny"]


def test_a_sequence_as_long_as_the_memory_runs_to_its_end_alone() -> None:
    sequence = SimulatedSequence("all", 50, 50)
    scheduler = submitted(sequence, SimulatedSequence("other", 50, 50), kv_tokens=LONGEST)
    while scheduler.running or scheduler.waiting:
        stepped(scheduler)
    assert (sequence.generated, sequence.preemptions) == (50, 0)


def test_the_gate_is_shown_the_decoding_and_the_prompt_tokens_still_to_compute() -> None:
    seen: list[tuple[list[str], int]] = []

    class Watching(OpenGate):
        def plan(self, now: float, decoding: Sequence[Decoding], prefill_backlog: int) -> StepPlan:
            seen.append(([d.request_id for d in decoding], prefill_backlog))
            return StepPlan(max_prefill_tokens=20)

    stepped(submitted(SimulatedSequence("a", 30, 5), SimulatedSequence("b", 25, 5), gate=Watching()), 4)
    assert seen == [([], 55), ([], 35), (["a"], 15), (["a", "b"], 0)]


@pytest.mark.parametrize("mode", STEP_MODES)
def test_a_loose_bound_decodes_in_its_share_of_the_steps(mode: str) -> None:
    scheduler = submitted(
        SimulatedSequence("strict", 5, 90, 0.03), SimulatedSequence("loose", 5, 90, 0.06), gate=CreditGate(),
        step_mode=mode,
    )  # fmt: skip
    stepped(scheduler)
    decoded = Counter(name for names, _ in stepped(scheduler, 40) for name in names)
    assert decoded == {"strict": 40, "loose": 20}


def test_the_gate_forgets_who_leaves() -> None:
    gate = WhimsicalGate(39)  # caps prompts at 39 tokens
    done, gone = SimulatedSequence("done", 5, 1), SimulatedSequence("gone", 5, 9)
    scheduler = submitted(done, gone, gate=gate)
    stepped(scheduler)
    gone.abandoned = True
    scheduler.drop_abandoned()
    assert gate.forgotten == ["done", "gone"]


def test_whoever_is_abandoned_in_the_middle_of_a_prompt_or_in_the_queue_leaves_too() -> None:
    half, queued = SimulatedSequence("half", 80, 9), SimulatedSequence("queued", 80, 9)
    scheduler = submitted(half, queued, max_num_batched_tokens=50, max_num_seqs=1)
    stepped(scheduler)
    assert (half.prefilled, scheduler.running, scheduler.waiting) == (50, 1, 1)
    half.abandoned = queued.abandoned = True
    scheduler.drop_abandoned()
    assert (scheduler.running, scheduler.waiting, scheduler.kv_usage) == (0, 0, 0.0)


@pytest.mark.parametrize("mode", STEP_MODES)
def test_clearing_leaves_an_empty_engine_that_serves_again(mode: str) -> None:
    first = [SimulatedSequence(str(i), 40, 20) for i in range(5)]
    scheduler = submitted(*first, max_num_seqs=3, kv_tokens=128, step_mode=mode)
    stepped(scheduler, 3)
    assert {s.request_id for s in scheduler.clear()} == {s.request_id for s in first}
    assert (scheduler.running, scheduler.waiting, scheduler.kv_usage) == (0, 0, 0.0)
    assert scheduler.plan(0.0).empty
    assert [s.generated for s in play(scheduler, [Comes(60, 40, None, 0)])] == [40]
    assert scheduler.kv_usage == 0


@pytest.mark.parametrize(
    ("limits", "says"),
    [
        ({"step_mode": "decode-first"}, "unknown step mode 'decode-first': use one of chunked, prefill-first"),
        ({"kv_tokens": 99}, "kv_tokens (99) must hold one sequence of max_model_len (100) tokens"),
    ],
)
def test_what_could_not_work_is_refused_with_what_would(limits: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError) as refused:
        SimulatedScheduler(**{**WIDE, **limits})
    assert str(refused.value) == says
