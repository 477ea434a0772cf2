"""Who makes way in a full engine, and for whom."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from engine_adapter.make_way import PEAK_S, MakeWay, RecentPeak, Room, kept_places
from engine_adapter.simulated_scheduler import SimulatedScheduler
from engine_adapter.simulated_sequence import SimulatedSequence
from engine_adapter.slack_gate import SlackGate

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


def test_in_an_engine_without_anybody_who_has_a_pace_nobody_makes_way() -> None:
    way = MakeWay(Room(8, 100))
    assert way.plan(NOW, Room(0, 0), Room(8, 100), Room(), [10] * 8, None) is None
    assert way.plan(NOW, Room(0, 0), Room(8, 100), Room(1, 1), [10] * 8, None) is not None
    assert way.plan(NOW + 3 * PEAK_S, Room(0, 0), Room(8, 100), Room(), [10] * 8, 5) is None


def test_so_many_make_way_as_places_are_wanted_beyond_those_that_are_free() -> None:
    def leaving(free: int, wanted: int) -> int:
        others = 30 - free
        found = MakeWay(Room(40, PLENTY)).plan(
            NOW, Room(free, PLENTY), Room(others, 0), Room(wanted, 0), [0] * others, 1
        )
        assert found is not None and not found.goes_on
        return found.leaving

    assert (leaving(0, 3), leaving(2, 3), leaving(3, 3)) == (3, 1, 0)


def test_for_memory_too_until_what_they_had_suffices() -> None:
    way = MakeWay(Room(10, 100))
    # Ten blocks are wanted and nine are free; and each of the seven that run may need one at once.
    found = way.plan(NOW, Room(3, 9), Room(5, 60), Room(1, 10), [3, 4, 5, 6, 7], None)
    assert found is not None and found.leaving == 3  # 3 + 4 are not 8


@given(st.integers(1, 300), st.integers(0, 300), st.integers(0, 300))
def test_a_share_of_the_places_is_never_taken_from_them(places: int, others: int, wanted: int) -> None:
    others = min(others, places)
    found = MakeWay(Room(places, PLENTY)).plan(
        NOW, Room(places - others, PLENTY), Room(others, others), Room(wanted, wanted), [1] * others, None
    )
    if found is not None:
        assert others - found.leaving >= min(others, kept_places(places))


def test_they_go_on_once_there_is_room_for_all_that_lately_was_wanted_by_others() -> None:
    way = MakeWay(Room(10, 100))

    def goes_on(now: float, paced: int, others: int, needed: int = 5) -> bool:
        free = Room(10 - paced - others, 100 - 10 * paced - 5 * others)
        found = way.plan(now, free, Room(others, 5 * others), Room(), [5] * others, needed)
        return found is None or found.goes_on

    assert not goes_on(NOW, paced=6, others=4)
    assert not goes_on(NOW + 1, paced=3, others=4), "a moment ago there were six"
    later = NOW + 2 * PEAK_S
    assert goes_on(later, paced=3, others=4)
    assert not goes_on(later, paced=3, others=7)
    assert not goes_on(later, paced=3, others=4, needed=60), "memory"
    assert goes_on(later, paced=10, others=0), "their share of the places"


# --- in a scheduler ---------------------------------------------------------------------------------------------------


def full_of_others(places: int, **limits: int) -> tuple[SimulatedScheduler, list[SimulatedSequence]]:
    """An engine full of requests without a pace, which all decode; room for longer ones is there."""
    sizes = {"max_num_seqs": places, "max_num_batched_tokens": 1000, "max_model_len": 400, "kv_tokens": 100_000}
    scheduler = SimulatedScheduler(**{**sizes, **limits}, gate=SlackGate())
    others = [SimulatedSequence(f"o{i}", 20, 200) for i in range(places)]
    for sequence in others:
        scheduler.submit(sequence)
    scheduler.finish(scheduler.plan(NOW))
    assert len(scheduler.decoding) == places
    return scheduler, others


def test_whoever_has_a_pace_gets_a_place_in_the_next_step_and_the_latest_gives_it() -> None:
    scheduler, others = full_of_others(8)
    scheduler.finish(scheduler.plan(NOW))
    paced = SimulatedSequence("paced", 20, 3, PACE_S)
    scheduler.submit(paced)
    step = scheduler.plan(NOW)
    assert [s for s, _ in step.chunks] == [paced]
    assert step.decodes == others[:-1]
    assert (others[-1].generated, others[-1].preemptions, scheduler.put_aside) == (2, 1, 1)


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
    assert scheduler.put_aside == 7, "all but one, whose place is theirs"
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
    assert scheduler.put_aside == 1
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
    assert scheduler.put_aside > 0


def test_where_no_gate_lets_them_make_way_the_schedule_is_vllms() -> None:
    sequences = [SimulatedSequence(f"o{i}", 20, 30) for i in range(4)]
    scheduler = SimulatedScheduler(max_num_seqs=4, max_num_batched_tokens=1000, max_model_len=400, kv_tokens=10_000)
    for sequence in [*sequences, SimulatedSequence("paced", 20, 3, PACE_S)]:
        scheduler.submit(sequence)
    for _ in range(20):
        scheduler.finish(scheduler.plan(NOW))
    assert (scheduler.put_aside, scheduler.waiting) == (0, 1)
