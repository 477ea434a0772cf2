"""Who makes way in a full engine, and for whom."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from engine_adapter.gates.base import OpenGate, StepGate
from engine_adapter.gates.best_effort_preemption import (
    PEAK_S,
    BestEffortPreemption,
    RecentPeak,
    Room,
    Seen,
    Way,
    reserved_slots,
)
from engine_adapter.gates.slack import TURN, SlackGate
from engine_adapter.simulated.scheduler import SimulatedScheduler
from engine_adapter.simulated.sequence import SimulatedSequence

NOW = 1000.0
PACE_S = 0.05
PLENTY = 10_000


# --- the recent peak --------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.floats(0, 30), st.integers(0, 50)), min_size=1))
def test_the_peak_is_that_of_the_latest_seconds(notes: list[tuple[float, int]]) -> None:
    peak, now, said = RecentPeak(), NOW, []
    for gap_s, value in notes:
        now += gap_s
        said.append((now, value))
        assert peak.note(now, value) == max(v for at, v in said if at >= now - PEAK_S)


# --- the rule ---------------------------------------------------------------------------------------------------------


def seen(free: Room, others: Room, **more: Any) -> Seen:
    return Seen(free=free, others=others, **more)


def test_in_an_engine_without_anybody_who_has_a_pace_nobody_makes_way() -> None:
    way, full, wants = BestEffortPreemption(Room(8, 100)), Room(8, 100), Room(1, 1)
    assert way.plan(NOW, seen(Room(), full, latest=[10] * 8)) is None
    assert way.plan(NOW, seen(Room(), full, latest=[10] * 8, wanted=wants)) is not None
    assert way.plan(NOW + 3 * PEAK_S, seen(Room(), full, latest=[10] * 8, next_blocks=5)) is None


def test_so_many_make_way_as_places_are_wanted_beyond_those_that_are_free() -> None:
    def leaving(free: int, wanted: int) -> int:
        others = Room(30 - free, 0)
        now = seen(Room(free, PLENTY), others, wanted=Room(wanted, 0), latest=[0] * others.slots, next_blocks=1)
        found = BestEffortPreemption(Room(40, PLENTY)).plan(NOW, now)
        assert found is not None and not found.goes_on
        return found.leaving

    assert (leaving(0, 3), leaving(2, 3), leaving(3, 3)) == (3, 1, 0)


def test_for_memory_too_until_what_they_had_suffices() -> None:
    way = BestEffortPreemption(Room(10, 100))
    # Ten blocks are wanted and nine are free; and each of the seven that run may need one at once.
    found = way.plan(NOW, seen(Room(3, 9), Room(5, 60), wanted=Room(1, 10), latest=[3, 4, 5, 6, 7]))
    assert found is not None and found.leaving == 3  # 3 + 4 are not 8


@given(st.integers(1, 300), st.integers(0, 300), st.integers(0, 300))
def test_a_share_of_the_places_is_never_taken_from_them(slots: int, others: int, wanted: int) -> None:
    others = min(others, slots)
    free, wants = Room(slots - others, PLENTY), Room(wanted, wanted)
    found = BestEffortPreemption(Room(slots, PLENTY)).plan(
        NOW, seen(free, Room(others, others), wanted=wants, latest=[1] * others)
    )
    if found is not None:
        assert others - found.leaving >= min(others, reserved_slots(slots))


def goes_on(way: BestEffortPreemption, now: float, paced: int, others: int, needed: int = 5, wanted: int = 0) -> Way:
    """In an engine of 10 places and 110 blocks: who has a pace has 10 of these, the others 5."""
    free, theirs = Room(10 - paced - others, 110 - 10 * paced - 5 * others), Room(others, 5 * others)
    found = way.plan(now, seen(free, theirs, latest=[], next_blocks=needed, wanted=Room(wanted, wanted)))
    assert found is not None
    return found


def test_they_go_on_once_there_is_room_for_all_that_lately_was_wanted_by_others() -> None:
    way = BestEffortPreemption(Room(10, 110))
    assert not goes_on(way, NOW, paced=6, others=4).goes_on
    assert not goes_on(way, NOW + 1, paced=3, others=4).goes_on, "a moment ago there were six"
    later = NOW + 2 * PEAK_S
    assert goes_on(way, later, paced=3, others=4) == Way(goes_on=True)
    assert not goes_on(way, later, paced=3, others=4, wanted=1).goes_on, "who has a pace goes before"
    assert not goes_on(way, later, paced=3, others=7).goes_on
    assert not goes_on(way, later, paced=3, others=4, needed=53).goes_on, "seven run, and may need a block each"


def test_who_has_a_right_to_a_place_goes_first_but_only_where_there_is_room() -> None:
    way = BestEffortPreemption(Room(10, 110))
    assert goes_on(way, NOW, paced=9, others=0, wanted=3) == Way(goes_on=True, first=True)
    assert goes_on(way, NOW, paced=9, others=0, wanted=3, needed=11) == Way()
    assert goes_on(way, NOW, paced=10, others=0, wanted=3) == Way()
    assert goes_on(way, NOW, paced=8, others=1, wanted=3) == Way()


def test_their_prompts_rest_while_those_of_others_are_there_but_have_their_turn() -> None:
    way, busy = BestEffortPreemption(Room(10, 110)), seen(Room(5, 60), Room(1, 5), prompts=True, others_prompts=True)
    steps = [way.plan(NOW, busy) for _ in range(2 * TURN)]
    assert [step is not None and step.rest for step in steps] == ([True] * (TURN - 1) + [False]) * 2
    for alone in (replace(busy, prompts=False), replace(busy, others_prompts=False)):
        assert way.plan(NOW, alone) == Way()


# --- in a scheduler ---------------------------------------------------------------------------------------------------


def full_of_others(slots: int, output: int = 200, **limits: int) -> tuple[SimulatedScheduler, list[SimulatedSequence]]:
    """An engine full of requests without a pace, which all decode; room for longer ones is there."""
    sizes = {"max_num_seqs": slots, "max_num_batched_tokens": 1000, "max_model_len": 400, "kv_tokens": 100_000}
    scheduler = SimulatedScheduler(**{**sizes, **limits}, gate=SlackGate())
    others = [SimulatedSequence(f"o{i}", 20, output) for i in range(slots)]
    for sequence in others:
        scheduler.submit(sequence)
    while scheduler.waiting:
        scheduler.finish(scheduler.plan(NOW))
    scheduler.finish(scheduler.plan(NOW))
    assert len(scheduler.decoding) == slots
    return scheduler, others


def test_whoever_has_a_pace_gets_a_place_in_the_next_step_and_the_latest_gives_it() -> None:
    scheduler, others = full_of_others(8)
    scheduler.finish(scheduler.plan(NOW))
    paced = SimulatedSequence("paced", 20, 3, PACE_S)
    scheduler.submit(paced)
    step = scheduler.plan(NOW)
    assert [s for s, _ in step.chunks] == [paced]
    assert step.decodes == others[:-1]
    assert (others[-1].generated, others[-1].preemptions, scheduler.best_effort_preemptions) == (3, 1, 1)


def test_what_was_put_aside_goes_on_where_it_was_when_the_others_have_long_been_gone() -> None:
    scheduler, others = full_of_others(8)
    comers = [SimulatedSequence(f"p{i}", 20, 40, PACE_S) for i in range(8)]
    for sequence in comers:
        scheduler.submit(sequence)
    now, ended = NOW, {}
    while scheduler.running or scheduler.waiting:
        step = scheduler.plan(now)
        assert scheduler.running <= 8
        ended.update({s.request_id: now for s in scheduler.finish(step).done})
        now += 0.03
        assert now < NOW + 60
    assert scheduler.best_effort_preemptions == 7, "all but one, whose place is theirs"
    assert max(ended[s.request_id] for s in comers) < NOW + 3, "the last had to wait for the first"
    assert all(s.generated == s.output_tokens for s in others + comers)
    assert min(ended[s.request_id] for s in others[1:]) > NOW + PEAK_S
    assert scheduler.kv_usage == 0


def test_a_stream_of_short_answers_does_not_have_them_computed_again_for_each() -> None:
    scheduler, others = full_of_others(8)
    now, done = NOW, Counter[str]()
    for number in range(1000):
        if number % 10 == 0:
            scheduler.submit(SimulatedSequence(f"p{number}", 20, 5, PACE_S))
        for sequence in scheduler.finish(scheduler.plan(now)).done:
            done[sequence.request_id[0]] += 1
        now += 0.03
    assert done["p"] == 100
    assert scheduler.best_effort_preemptions == 1
    assert done["o"] == 8, "it had a place again when the first of its kind had ended"
    assert others[-1].preemptions == 1


def test_memory_is_given_up_before_anybody_with_a_pace_has_to_be_preempted() -> None:
    # 38 blocks: the paced one comes to need 22, and the one whose place is safe 14.
    scheduler, _ = full_of_others(8, kv_tokens=600)
    paced = SimulatedSequence("paced", 200, 150, PACE_S)
    scheduler.submit(paced)
    now = NOW
    while paced.generated < paced.output_tokens:
        scheduler.finish(scheduler.plan(now))
        now += 0.03
        assert now < NOW + 20
    assert paced.preemptions == 0
    assert scheduler.best_effort_preemptions > 0


def test_where_no_gate_lets_them_make_way_the_schedule_is_vllms() -> None:
    sequences = [SimulatedSequence(f"o{i}", 20, 30) for i in range(4)]
    scheduler = SimulatedScheduler(max_num_seqs=4, max_num_batched_tokens=1000, max_model_len=400, kv_tokens=10_000)
    for sequence in [*sequences, SimulatedSequence("paced", 20, 3, PACE_S)]:
        scheduler.submit(sequence)
    for _ in range(20):
        scheduler.finish(scheduler.plan(NOW))
    assert (scheduler.best_effort_preemptions, scheduler.waiting) == (0, 1)


def test_no_memory_is_given_back_that_would_be_short_in_the_next_step() -> None:
    def played(gate: StepGate) -> tuple[int, int]:
        scheduler = SimulatedScheduler(
            max_num_seqs=64, max_num_batched_tokens=2048, max_model_len=8000, kv_tokens=20_000, gate=gate
        )
        scheduler.submit(SimulatedSequence("paced", 500, 5000, PACE_S))
        for number in range(30):
            scheduler.submit(SimulatedSequence(f"o{number}", 500, 1000))
        prefilled = 0
        for step in range(1500):
            planned = scheduler.plan(NOW + 0.03 * step)
            prefilled += planned.prefill_tokens
            scheduler.finish(planned)
        return scheduler.preemptions, prefilled

    stock, ours = played(OpenGate()), played(SlackGate())
    assert ours[0] <= 1.2 * stock[0]
    assert ours[1] <= 1.2 * stock[1]


def test_those_who_never_ran_do_not_go_before_who_has_a_pace() -> None:
    scheduler, _ = full_of_others(8)
    for number in range(40):
        scheduler.submit(SimulatedSequence(f"n{number}", 200, 100))
    scheduler.finish(scheduler.plan(NOW))
    paced = SimulatedSequence("paced", 20, 3, PACE_S)
    scheduler.submit(paced)
    assert [s for s, _ in scheduler.plan(NOW).chunks] == [paced]
    assert scheduler.best_effort_preemptions == 1


def test_the_share_of_those_put_aside_is_filled_again_when_the_first_have_ended() -> None:
    # In every step somebody with a pace waits for his prompt to be computed.
    scheduler, others = full_of_others(40, output=60, max_num_batched_tokens=64)
    for number in range(40):
        scheduler.submit(SimulatedSequence(f"p{number}", 20, 300, PACE_S))
    for step in range(3000):
        scheduler.submit(SimulatedSequence(f"c{step}", 60, 1, PACE_S))
        scheduler.finish(scheduler.plan(NOW + 0.03 * step))
    ended = sum(s.generated == s.output_tokens for s in others)
    assert ended > 3, "two at a time; each needs 60 tokens, in a twentieth of the steps"
