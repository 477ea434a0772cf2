"""The simulated scheduler keeps vLLM's limits and loses no token."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_adapter.gates.base import Decoding, OpenGate, StepPlan
from engine_adapter.gates.credit import CreditGate
from engine_adapter.gates.slack import SlackGate
from engine_adapter.service_kind import ServiceKind
from engine_adapter.simulated.scheduler import BLOCK_TOKENS, STEP_MODES, SimulatedScheduler
from engine_adapter.simulated.sequence import SimulatedSequence
from engine_adapter.simulated.step import Finished, Step
from tests.fixtures.scheduler_workloads import (
    ARRIVALS,
    GATES,
    LIMITS,
    MAX_MODEL_LEN,
    Arrival,
    PseudoRandomGate,
    run_to_completion,
)

MODES = st.sampled_from(STEP_MODES)
WIDE = {"max_num_seqs": 8, "max_num_batched_tokens": 1000, "max_model_len": MAX_MODEL_LEN, "kv_tokens": 10_000}


def held_blocks(scheduler: SimulatedScheduler) -> int:
    return sum(s.capacity for s in scheduler.sequences()) // BLOCK_TOKENS


# --- invariants of every step -----------------------------------------------------------------------------------------


@given(ARRIVALS, LIMITS, GATES, MODES)
def test_steps_keep_the_token_budget_and_the_batch_size(
    arrivals: list[Arrival], limits: dict[str, int], gate: Any, mode: str
) -> None:
    scheduler = SimulatedScheduler(**limits, gate=gate, step_mode=mode)

    def check(step: Step) -> None:
        chunks = [tokens for _, tokens in step.chunks]
        assert step.prefill_tokens == sum(chunks)
        assert all(tokens > 0 for tokens in chunks)
        alone = mode == "prefill-first" and len(chunks) == 1  # a prompt longer than the budget
        assert alone or len(step.decodes) + sum(chunks) <= limits["max_num_batched_tokens"]
        assert scheduler.running <= limits["max_num_seqs"]

    run_to_completion(scheduler, arrivals, check)


@given(ARRIVALS, LIMITS, GATES, MODES)
def test_kv_blocks_are_free_or_held_and_hold_all_computed_tokens(
    arrivals: list[Arrival], limits: dict[str, int], gate: Any, mode: str
) -> None:
    scheduler = SimulatedScheduler(**limits, gate=gate, step_mode=mode)
    blocks = -(-limits["kv_tokens"] // BLOCK_TOKENS)

    def check(step: Step) -> None:
        assert 0 <= held_blocks(scheduler) <= blocks
        assert scheduler.kv_usage == pytest.approx(held_blocks(scheduler) / blocks)
        assert all(s.capacity >= s.length for s in step.decodes)
        assert all(s.capacity >= s.computed + tokens for s, tokens in step.chunks)
        assert step.decode_context == sum(s.length for s in step.decodes)
        assert step.prefill_context == sum(s.computed for s, _ in step.chunks)

    run_to_completion(scheduler, arrivals, check)
    assert scheduler.kv_usage == 0


@given(ARRIVALS, LIMITS, GATES, MODES)
def test_each_sequence_gets_exactly_its_tokens_despite_preemptions(
    arrivals: list[Arrival], limits: dict[str, int], gate: Any, mode: str
) -> None:
    scheduler = SimulatedScheduler(**limits, gate=gate, step_mode=mode)
    tokens: Counter[str] = Counter()
    ended: list[str] = []

    def record(step: Step, finished: Finished) -> None:
        tokens.update(s.request_id for s in (*step.decodes, *finished.prefilled))
        ended.extend(s.request_id for s in finished.done)

    sequences = run_to_completion(scheduler, arrivals, on_finish=record)
    assert sorted(ended) == sorted(s.request_id for s in sequences)
    assert [tokens[s.request_id] for s in sequences] == [arrival.output for arrival in arrivals]
    assert [s.generated for s in sequences] == [arrival.output for arrival in arrivals]
    assert scheduler.preemptions == sum(s.preemptions for s in sequences)


@given(ARRIVALS, LIMITS, GATES, MODES)
def test_prompts_start_in_arrival_order_among_equally_preemptible(
    arrivals: list[Arrival], limits: dict[str, int], gate: Any, mode: str
) -> None:
    started: dict[SimulatedSequence, None] = {}
    run_to_completion(
        SimulatedScheduler(**limits, gate=gate, step_mode=mode),
        arrivals,
        lambda step: started.update(dict.fromkeys(s for s, _ in step.chunks)),
    )
    for preemptible in (False, True):
        ids = [int(s.request_id) for s in started if s.preemptible == preemptible]
        assert ids == sorted(ids, key=lambda i: (arrivals[i].step, i))
    assert len(started) == len(arrivals)


@given(ARRIVALS, LIMITS, GATES, MODES)
def test_sequences_that_sit_out_do_not_decode(
    arrivals: list[Arrival], limits: dict[str, int], gate: Any, mode: str
) -> None:
    def check(step: Step) -> None:
        assert not step.sat_out & {s.request_id for s in step.decodes}

    run_to_completion(SimulatedScheduler(**limits, gate=gate, step_mode=mode), arrivals, check)


@given(ARRIVALS, LIMITS, GATES)
def test_prefill_first_steps_have_whole_prompts_and_no_decodes(
    arrivals: list[Arrival], limits: dict[str, int], gate: Any
) -> None:
    def check(step: Step) -> None:
        assert not (step.decodes and step.chunks)
        assert all((s.computed, tokens) == (0, s.length) for s, tokens in step.chunks)

    run_to_completion(SimulatedScheduler(**limits, gate=gate, step_mode="prefill-first"), arrivals, check)


ABORTED = ARRIVALS.flatmap(
    lambda arrivals: st.lists(st.none() | st.integers(0, 60), min_size=len(arrivals), max_size=len(arrivals)).map(
        lambda steps: [replace(a, aborted_at=step) for a, step in zip(arrivals, steps, strict=True)]
    )
)


@given(ABORTED, LIMITS, GATES, MODES)
def test_aborted_sequences_free_their_memory_and_the_others_finish(
    arrivals: list[Arrival], limits: dict[str, int], gate: Any, mode: str
) -> None:
    scheduler = SimulatedScheduler(**limits, gate=gate, step_mode=mode)

    def check(step: Step) -> None:
        assert not any(s.abandoned for s in (*step.decodes, *(s for s, _ in step.chunks)))
        blocks = -(-limits["kv_tokens"] // BLOCK_TOKENS)
        assert scheduler.kv_usage == pytest.approx(held_blocks(scheduler) / blocks)

    sequences = run_to_completion(scheduler, arrivals, check)
    assert all(s.abandoned or s.generated == s.output_tokens for s in sequences)
    assert scheduler.kv_usage == 0


# --- examples ---------------------------------------------------------------------------------------------------------


def submitted(*sequences: SimulatedSequence, **limits: Any) -> SimulatedScheduler:
    scheduler = SimulatedScheduler(**{**WIDE, **limits})
    for sequence in sequences:
        scheduler.submit(sequence)
    return scheduler


def stepped(scheduler: SimulatedScheduler, steps: int = 1) -> list[tuple[list[str], dict[str, int]]]:
    """The ids that decode, and the chunks, of each of the next steps."""
    result = []
    for _ in range(steps):
        step = scheduler.plan(0.0)
        result.append(([s.request_id for s in step.decodes], {s.request_id: tokens for s, tokens in step.chunks}))
        scheduler.finish(step)
    return result


def test_decodes_go_first_and_prompts_fill_the_budget() -> None:
    scheduler = submitted(SimulatedSequence("a", 30, 9), max_num_batched_tokens=40)
    stepped(scheduler)
    for name in ("b", "c"):
        scheduler.submit(SimulatedSequence(name, 50, 9))
    assert stepped(scheduler, 3) == [
        (["a"], {"b": 39}),
        (["a"], {"b": 11, "c": 28}),
        (["a", "b"], {"c": 22}),
    ]


def test_prefill_first_delays_decodes_for_each_prompt_that_fits() -> None:
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


def test_newest_sequence_is_preempted_and_recomputed_with_its_output() -> None:
    # Four blocks, two for each sequence; the 33rd token of the older one needs a fifth.
    old, young = SimulatedSequence("old", 30, 20), SimulatedSequence("young", 28, 20)
    scheduler = submitted(old, young, max_model_len=64, kv_tokens=64)
    assert stepped(scheduler, 3)[1:] == [(["old", "young"], {})] * 2
    assert (old.length, young.length) == (33, 31)
    assert stepped(scheduler) == [(["old"], {})]
    assert (young.preemptions, young.left, young.computed, young.capacity) == (1, 31, 0, 0)
    assert (scheduler.running, scheduler.waiting, scheduler.preemptions) == (1, 1, 1)
    until_it_fits = stepped(scheduler, 17)
    assert until_it_fits[-1] == ([], {"young": 31})
    assert young.generated == 4, "the step that recomputes it also samples a token"


def test_step_with_a_preemption_admits_no_sequence() -> None:
    scheduler = submitted(SimulatedSequence("old", 32, 20), SimulatedSequence("young", 32, 20), kv_tokens=64,
                          max_model_len=64)  # fmt: skip
    stepped(scheduler)
    scheduler.submit(SimulatedSequence("tiny", 1, 1))
    assert stepped(scheduler) == [(["old"], {})]
    assert [s.request_id for s in scheduler.sequences()] == ["old", "young", "tiny"]


def test_sequence_that_needs_all_memory_finishes() -> None:
    sequence = SimulatedSequence("all", 50, 50)
    scheduler = submitted(sequence, SimulatedSequence("other", 50, 50), kv_tokens=MAX_MODEL_LEN)
    while scheduler.running or scheduler.waiting:
        stepped(scheduler)
    assert (sequence.generated, sequence.preemptions) == (50, 0)


def test_gate_receives_decoding_sequences_and_prefill_backlog() -> None:
    calls: list[tuple[list[str], int]] = []

    class RecordingGate(OpenGate):
        def plan(
            self, now: float, decoding: Sequence[Decoding], prefill_backlog: int, yielding_prompts: bool = False
        ) -> StepPlan:
            calls.append(([d.request_id for d in decoding], prefill_backlog))
            return StepPlan(max_prefill_tokens=20)

    stepped(submitted(SimulatedSequence("a", 30, 5), SimulatedSequence("b", 25, 5), gate=RecordingGate()), 4)
    assert calls == [([], 55), ([], 35), (["a"], 15), (["a", "b"], 0)]


@pytest.mark.parametrize("mode", STEP_MODES)
def test_loose_pace_decodes_in_its_share_of_steps(mode: str) -> None:
    scheduler = submitted(
        SimulatedSequence("strict", 5, 90, 0.03), SimulatedSequence("loose", 5, 90, 0.06), gate=CreditGate(),
        step_mode=mode,
    )  # fmt: skip
    stepped(scheduler)
    decoded = Counter(name for names, _ in stepped(scheduler, 40) for name in names)
    assert decoded == {"strict": 40, "loose": 20}


def test_gate_forgets_sequences_that_leave() -> None:
    gate = PseudoRandomGate(39)  # caps prompts at 39 tokens
    done, aborted = SimulatedSequence("done", 5, 1), SimulatedSequence("aborted", 5, 9)
    scheduler = submitted(done, aborted, gate=gate)
    stepped(scheduler)
    aborted.abandoned = True
    scheduler.drop_abandoned()
    assert gate.forgotten == ["done", "aborted"]


def test_aborted_prefilling_and_waiting_sequences_leave() -> None:
    half, queued = SimulatedSequence("half", 80, 9), SimulatedSequence("queued", 80, 9)
    scheduler = submitted(half, queued, max_num_batched_tokens=50, max_num_seqs=1)
    stepped(scheduler)
    assert (half.computed, scheduler.running, scheduler.waiting) == (50, 1, 1)
    half.abandoned = queued.abandoned = True
    scheduler.drop_abandoned()
    assert (scheduler.running, scheduler.waiting, scheduler.kv_usage) == (0, 0, 0.0)


@pytest.mark.parametrize("mode", STEP_MODES)
def test_cleared_scheduler_serves_again(mode: str) -> None:
    first = [SimulatedSequence(str(i), 40, 20) for i in range(5)]
    scheduler = submitted(*first, max_num_seqs=3, kv_tokens=128, step_mode=mode)
    stepped(scheduler, 3)
    assert {s.request_id for s in scheduler.clear()} == {s.request_id for s in first}
    assert (scheduler.running, scheduler.waiting, scheduler.kv_usage) == (0, 0, 0.0)
    assert scheduler.plan(0.0).empty
    assert [s.generated for s in run_to_completion(scheduler, [Arrival(60, 40, None, 0)])] == [40]
    assert scheduler.kv_usage == 0


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"step_mode": "decode-first"}, "unknown step mode 'decode-first': use one of chunked, prefill-first"),
        ({"kv_tokens": 99}, "kv_tokens (99) must hold one sequence of max_model_len (100) tokens"),
    ],
)
def test_invalid_options_are_rejected_with_the_fix(limits: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        SimulatedScheduler(**{**WIDE, **limits})
    assert str(error.value) == message


# --- yielding sequences -----------------------------------------------------------------------------------------------


def test_prompts_of_yielding_sequences_wait_for_those_of_others() -> None:
    long = SimulatedSequence("long", 120, 5, pace_s=0.05, kind=ServiceKind.YIELDING)
    scheduler = submitted(long, max_num_batched_tokens=50, gate=SlackGate())
    assert stepped(scheduler) == [([], {"long": 50})]
    for name, kind in (("yielding", ServiceKind.YIELDING), ("other", ServiceKind.PACED)):
        scheduler.submit(SimulatedSequence(name, 60, 1, pace_s=9.0, kind=kind))
    assert [list(chunks) for _, chunks in stepped(scheduler, 2)] == [["other"], ["other"]]
    assert stepped(scheduler)[0][1] == {"long": 50}
    while scheduler.running or scheduler.waiting:
        stepped(scheduler)
    assert long.generated == 5


def test_best_effort_prompts_do_not_hold_yielding_ones() -> None:
    yielding = SimulatedSequence("yielding", 60, 5, pace_s=0.05, kind=ServiceKind.YIELDING)
    scheduler = submitted(yielding, SimulatedSequence("best-effort", 60, 5), gate=SlackGate())
    assert "yielding" in stepped(scheduler)[0][1]
