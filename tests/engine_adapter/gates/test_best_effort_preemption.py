"""Best-effort preemption: the plan as a function of members, and its effect on the simulated scheduler."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_adapter.gates.base import OpenGate, StepGate
from engine_adapter.gates.best_effort_preemption import (
    BestEffortPreemption,
    Capacity,
    Member,
    PreemptionPlan,
    RecentPeak,
    reserved_slots,
)
from engine_adapter.gates.composite import Gates
from engine_adapter.gates.constants import SLACK
from engine_adapter.gates.credit import CreditGate
from engine_adapter.gates.slack import SlackGate
from engine_adapter.service_kind import ServiceKind
from engine_adapter.simulated.scheduler import SimulatedScheduler
from engine_adapter.simulated.sequence import SimulatedSequence

NOW = 1000.0
LATER = NOW + 2 * SLACK.peak_window_s
PACE_S = 0.05
UNLIMITED = 10_000
"""Blocks."""


# --- the recent peak --------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.floats(0, 30), st.integers(0, 50)), min_size=1))
def test_recent_peak_is_the_maximum_of_the_window(notes: list[tuple[float, int]]) -> None:
    peak, now, noted = RecentPeak(), NOW, []
    for gap_s, value in notes:
        now += gap_s
        noted.append((now, value))
        assert peak.note(now, value) == max(v for at, v in noted if at >= now - SLACK.peak_window_s)


# --- the plan ---------------------------------------------------------------------------------------------------------


def best_effort(count: int, held: int = 1, *, first: int = 0, needed: int | None = None, **more: Any) -> list[Member]:
    """Best-effort members "b0", "b1", ... of ``held`` blocks each."""
    needed = held if needed is None else needed
    return [Member(f"b{first + i}", True, held, needed, **more) for i in range(count)]


def others(count: int, held: int = 1, *, needed: int | None = None, **more: Any) -> list[Member]:
    needed = held if needed is None else needed
    return [Member(f"p{i}", False, held, needed, **more) for i in range(count)]


def plan(
    preemption: BestEffortPreemption,
    capacity: Capacity,
    running: Sequence[Member],
    waiting: Sequence[Member] = (),
    now: float = NOW,
) -> PreemptionPlan:
    """The plan of an engine in which only ``running`` has slots and blocks."""
    free = Capacity(capacity.slots - len(running), capacity.blocks - sum(m.held for m in running))
    found = preemption.plan(now, free, running, waiting)
    assert found is not None
    return found


def test_plan_is_none_without_recent_other_requests() -> None:
    preemption, full = BestEffortPreemption(Capacity(8, 100)), best_effort(8, 10)
    free = Capacity(0, 20)
    assert preemption.plan(NOW, free, full, []) is None
    assert preemption.plan(NOW, free, full, others(1, 0, needed=1)) is not None
    assert preemption.plan(NOW + 3 * SLACK.peak_window_s, free, full, best_effort(1, 0, needed=5)) is None


def test_peak_is_recorded_while_no_best_effort_request_is_there() -> None:
    preemption, resumable = BestEffortPreemption(Capacity(10, 110)), best_effort(1, 0, needed=1, preempted_before=True)
    assert preemption.plan(NOW, Capacity(0, 50), [], []) is None
    waits = plan(preemption, Capacity(10, 110), best_effort(4), resumable, NOW + 1)
    assert waits.held == ["b0"], "a second ago others had all slots"
    resumed = plan(preemption, Capacity(10, 110), [*others(1), *best_effort(4)], resumable, LATER)
    assert resumed.back == ["b0"]


@pytest.mark.parametrize(("free", "arrivals", "preempted"), [(0, 3, 3), (2, 3, 1), (3, 3, 0)])
def test_preempts_as_many_as_slots_are_missing(free: int, arrivals: int, preempted: int) -> None:
    capacity = Capacity(40, UNLIMITED)
    running = [*others(10, 0), *best_effort(30 - free, 0)]
    found = plan(BestEffortPreemption(capacity), capacity, running, others(arrivals, 0))
    assert found.preempt == [f"b{29 - free - i}" for i in range(preempted)], "newest first"
    assert found.held == found.preempt[::-1], "they wait in order of age"
    assert found.back == found.front == []


def test_preempts_until_missing_blocks_are_freed() -> None:
    # The arrival needs ten blocks of nine free ones, and each of the seven running requests may need one.
    running = [*others(2, 15), *(Member(f"b{held}", True, held, held) for held in (33, 7, 6, 5, 4, 3))]
    capacity = Capacity(11, 97)
    found = plan(BestEffortPreemption(capacity), capacity, running, others(1, 0, needed=10))
    assert found.preempt == ["b3", "b4", "b5"], "8 + 10 - 9 = 9 blocks are missing: 3 + 4 are too few"


def test_running_prompts_of_others_want_the_blocks_that_they_lack() -> None:
    capacity = Capacity(40, 110)
    running = [*others(1, 10, needed=40, prefilling=True), *best_effort(9, 10)]
    assert plan(BestEffortPreemption(capacity), capacity, running).preempt == ["b8", "b7", "b6"]


def test_prefilling_and_reserved_requests_are_not_preempted() -> None:
    capacity = Capacity(4, UNLIMITED)
    running = [*best_effort(2), *best_effort(2, first=2, prefilling=True)]
    assert plan(BestEffortPreemption(capacity), capacity, running, others(2, 0, needed=1)).preempt == ["b1"]


@given(st.integers(1, 300), st.integers(0, 300), st.integers(0, 300))
def test_reserved_slots_are_never_preempted(slots: int, running: int, arrivals: int) -> None:
    running = min(running, slots)
    free = Capacity(slots - running, UNLIMITED)
    found = BestEffortPreemption(Capacity(slots, UNLIMITED)).plan(
        NOW, free, best_effort(running), others(arrivals, 0, needed=1)
    )
    if found is not None:
        kept = running - len(found.preempt)
        assert kept >= min(running, reserved_slots(slots))
        assert found.preempt == [f"b{i}" for i in reversed(range(kept, running))], "the oldest stay"


@given(st.integers(1, 2000))
def test_reserved_slots_are_a_share_of_at_least_one(slots: int) -> None:
    assert 1 <= reserved_slots(slots) <= max(1.0, SLACK.best_effort_share * slots)


class TenSlots:
    """An engine of 10 slots and 110 blocks. Paced requests hold 10 blocks, best-effort requests 5."""

    def __init__(self) -> None:
        self.preemption = BestEffortPreemption(Capacity(10, 110))

    def plan(
        self, now: float, paced: int, running: int, *, needed: int = 5, arrivals: int = 0, recomputing: bool = False
    ) -> PreemptionPlan:
        """Two preempted best-effort requests wait, and one that is new."""
        mine = best_effort(running, 5)
        if recomputing:
            mine[-1] = mine[-1]._replace(prefilling=True, preempted_before=True)
        waiting = [
            *best_effort(1, 0, first=20, needed=needed),
            *best_effort(2, 0, first=10, needed=needed, preempted_before=True),
            *others(arrivals, 0, needed=1),
        ]
        return plan(self.preemption, Capacity(10, 110), [*others(paced, 10), *mine], waiting, now)


def test_preempted_request_resumes_once_the_recent_peak_leaves_a_slot() -> None:
    engine = TenSlots()
    assert engine.plan(NOW, paced=6, running=4).held == ["b10", "b11"]
    assert engine.plan(NOW + 1, paced=3, running=4).held == ["b10", "b11"], "a second ago there were six"
    resumed = engine.plan(LATER, paced=3, running=4)
    assert (resumed.back, resumed.held, resumed.front) == (["b20", "b10"], ["b11"], []), "one at a time"


@pytest.mark.parametrize(
    "changes",
    [{"arrivals": 1}, {"running": 7}, {"needed": 53}, {"recomputing": True}],
    ids=["an arrival waits", "no slot", "each running request may need a block", "one is being recomputed"],
)
def test_preempted_requests_stay_out_of_the_queue(changes: dict[str, Any]) -> None:
    engine = TenSlots()
    waits = engine.plan(LATER, **{"paced": 3, "running": 4, **changes})
    assert (waits.held, waits.back, waits.front) == (["b10", "b11"], ["b20"], [])


def test_reserved_slot_goes_to_the_first_best_effort_request_if_it_fits() -> None:
    engine = TenSlots()
    assert engine.plan(NOW, paced=9, running=0, arrivals=3).front == ["b10"]
    for full in ({"paced": 9, "running": 0, "needed": 11}, {"paced": 10, "running": 0}, {"paced": 8, "running": 1}):
        waits = engine.plan(NOW, **{"arrivals": 3, **full})
        assert (waits.front, waits.held) == ([], ["b10", "b11"])


def test_reserved_slot_goes_to_a_new_request_if_none_was_preempted() -> None:
    capacity = Capacity(10, 110)
    waiting = [*best_effort(3, 0, needed=1), *others(3, 0, needed=1)]
    found = plan(BestEffortPreemption(capacity), capacity, others(9, 10), waiting)
    assert (found.front, found.back, found.held) == (["b0"], ["b1", "b2"], [])


MEMBERS = st.lists(
    st.builds(
        lambda preemptible, held, more, prefilling, before: Member(
            None, preemptible, held, held + more * prefilling, prefilling, before
        ),
        st.booleans(), st.integers(0, 9), st.integers(0, 9), st.booleans(), st.booleans(),
    ),
    max_size=12,
)  # fmt: skip


@given(MEMBERS, MEMBERS, st.integers(0, 4), st.integers(0, 30))
def test_plan_moves_each_best_effort_request_once_and_no_other(
    running: list[Member], waiting: list[Member], free_slots: int, free_blocks: int
) -> None:
    running = [replace_request(m, f"r{i}") for i, m in enumerate(running)]
    waiting = [replace_request(m, f"w{i}") for i, m in enumerate(waiting)]
    capacity = Capacity(len(running) + free_slots, sum(m.held for m in running) + free_blocks)
    found = BestEffortPreemption(capacity).plan(NOW, Capacity(free_slots, free_blocks), running, waiting)
    if found is None:
        return
    mine = {m.request for m in (*running, *waiting) if m.preemptible}
    queued = [*found.front, *found.back, *found.held]
    assert sorted(queued) == sorted({*found.preempt, *(m.request for m in waiting if m.preemptible)})
    assert {*found.preempt} <= mine & {m.request for m in running}
    assert len(found.front) <= 1


def replace_request(member: Member, request: str) -> Member:
    return member._replace(request=request)


# --- in a scheduler ---------------------------------------------------------------------------------------------------


def full_of_best_effort(
    slots: int, output: int = 200, **limits: int
) -> tuple[SimulatedScheduler, list[SimulatedSequence]]:
    """An engine whose slots are taken by decoding best-effort sequences; longer ones would fit in its memory."""
    sizes = {"max_num_seqs": slots, "max_num_batched_tokens": 1000, "max_model_len": 400, "kv_tokens": 100_000}
    scheduler = SimulatedScheduler(**{**sizes, **limits}, gate=SlackGate())
    sequences = [SimulatedSequence(f"b{i}", 20, output) for i in range(slots)]
    for sequence in sequences:
        scheduler.submit(sequence)
    while scheduler.waiting:
        scheduler.finish(scheduler.plan(NOW))
    scheduler.finish(scheduler.plan(NOW))
    assert len(scheduler.decoding) == slots
    return scheduler, sequences


@pytest.mark.parametrize(
    ("pace_s", "kind"),
    [(PACE_S, ServiceKind.PACED), (3600.0, ServiceKind.PACED), (None, ServiceKind.DEADLINE_ONLY)],
    ids=["paced", "loose pace", "deadline-only"],
)
def test_arrival_preempts_the_newest_best_effort_sequence(pace_s: float | None, kind: ServiceKind) -> None:
    scheduler, running = full_of_best_effort(8)
    scheduler.finish(scheduler.plan(NOW))
    arrival = SimulatedSequence("arrival", 20, 3, pace_s, kind=kind)
    scheduler.submit(arrival)
    step = scheduler.plan(NOW)
    assert [s for s, _ in step.chunks] == [arrival]
    assert step.decodes == running[:-1]
    assert (running[-1].generated, running[-1].preemptions, scheduler.best_effort_preemptions) == (3, 1, 1)


def test_best_effort_arrival_with_a_pace_preempts_no_sequence() -> None:
    scheduler, _ = full_of_best_effort(8)
    scheduler.submit(SimulatedSequence("waived", 20, 3, PACE_S, kind=ServiceKind.BEST_EFFORT))
    scheduler.finish(scheduler.plan(NOW))
    assert (scheduler.best_effort_preemptions, scheduler.waiting) == (0, 1)


def test_best_effort_sequence_with_a_pace_is_preempted() -> None:
    scheduler = SimulatedScheduler(
        max_num_seqs=2, max_num_batched_tokens=1000, max_model_len=400, kv_tokens=100_000, gate=SlackGate()
    )
    waived = [SimulatedSequence(f"w{i}", 20, 50, PACE_S, kind=ServiceKind.BEST_EFFORT) for i in range(2)]
    for sequence in waived:
        scheduler.submit(sequence)
    scheduler.finish(scheduler.plan(NOW))
    scheduler.submit(SimulatedSequence("paced", 20, 3, PACE_S))
    scheduler.finish(scheduler.plan(NOW))
    assert [s.preemptions for s in waived] == [0, 1]


def test_preempted_sequences_continue_after_the_others_have_left() -> None:
    scheduler, preempted = full_of_best_effort(8)
    paced = [SimulatedSequence(f"p{i}", 20, 40, PACE_S) for i in range(8)]
    for sequence in paced:
        scheduler.submit(sequence)
    now, ended = NOW, {}
    while scheduler.running or scheduler.waiting:
        step = scheduler.plan(now)
        assert scheduler.running <= 8
        ended.update({s.request_id: now for s in scheduler.finish(step).done})
        now += 0.03
        assert now < NOW + 60
    assert scheduler.best_effort_preemptions == 7, "all but one, whose slot is reserved"
    assert max(ended[s.request_id] for s in paced) < NOW + 3, "the last waited for the first"
    assert all(s.generated == s.output_tokens for s in preempted + paced)
    assert min(ended[s.request_id] for s in preempted[1:]) > NOW + SLACK.peak_window_s
    assert scheduler.kv_usage == 0


def test_short_paced_requests_do_not_cause_repeated_recomputation() -> None:
    scheduler, running = full_of_best_effort(8)
    now, done = NOW, Counter[str]()
    for number in range(1000):
        if number % 10 == 0:
            scheduler.submit(SimulatedSequence(f"p{number}", 20, 5, PACE_S))
        for sequence in scheduler.finish(scheduler.plan(now)).done:
            done[sequence.request_id[0]] += 1
        now += 0.03
    assert done["p"] == 100
    assert scheduler.best_effort_preemptions == 1
    assert done["b"] == 8, "the preempted one got a slot again when the first best-effort sequence ended"
    assert running[-1].preemptions == 1


def test_best_effort_memory_is_freed_before_a_paced_sequence_is_preempted() -> None:
    # 38 blocks: the paced sequence grows to 22, and the one with the reserved slot to 14.
    scheduler, _ = full_of_best_effort(8, kv_tokens=600)
    paced = SimulatedSequence("paced", 200, 150, PACE_S)
    scheduler.submit(paced)
    now = NOW
    while paced.generated < paced.output_tokens:
        scheduler.finish(scheduler.plan(now))
        now += 0.03
        assert now < NOW + 20
    assert paced.preemptions == 0
    assert scheduler.best_effort_preemptions > 0


@pytest.mark.parametrize("gate", [OpenGate, CreditGate])
def test_gate_without_preemption_keeps_vllms_order(gate: type[StepGate]) -> None:
    sequences = [SimulatedSequence(f"b{i}", 20, 30) for i in range(4)]
    scheduler = SimulatedScheduler(
        max_num_seqs=4, max_num_batched_tokens=1000, max_model_len=400, kv_tokens=10_000, gate=gate()
    )
    for sequence in [*sequences, SimulatedSequence("paced", 20, 3, PACE_S)]:
        scheduler.submit(sequence)
    for _ in range(20):
        scheduler.finish(scheduler.plan(NOW))
    assert (scheduler.best_effort_preemptions, scheduler.waiting) == (0, 1)


def test_best_effort_arrival_of_another_gate_preempts_no_sequence() -> None:
    scheduler, _ = full_of_best_effort(8)
    scheduler.gate = Gates("slack")
    scheduler.submit(SimulatedSequence("other", 20, 3, gate="open"))
    for _ in range(3):
        scheduler.finish(scheduler.plan(NOW))
    assert (scheduler.best_effort_preemptions, scheduler.waiting) == (0, 1)


def test_resumed_memory_does_not_run_short_in_the_next_step() -> None:
    def outcome(gate: StepGate) -> tuple[int, int]:
        scheduler = SimulatedScheduler(
            max_num_seqs=64, max_num_batched_tokens=2048, max_model_len=8000, kv_tokens=20_000, gate=gate
        )
        scheduler.submit(SimulatedSequence("paced", 500, 5000, PACE_S))
        for number in range(30):
            scheduler.submit(SimulatedSequence(f"b{number}", 500, 1000))
        prefilled = 0
        for step in range(1500):
            planned = scheduler.plan(NOW + 0.03 * step)
            prefilled += planned.prefill_tokens
            scheduler.finish(planned)
        return scheduler.preemptions, prefilled

    stock, ours = outcome(OpenGate()), outcome(SlackGate())
    assert ours[0] <= 1.2 * stock[0]
    assert ours[1] <= 1.2 * stock[1]


def test_paced_arrival_overtakes_waiting_best_effort_sequences() -> None:
    scheduler, _ = full_of_best_effort(8)
    for number in range(40):
        scheduler.submit(SimulatedSequence(f"n{number}", 200, 100))
    scheduler.finish(scheduler.plan(NOW))
    paced = SimulatedSequence("paced", 20, 3, PACE_S)
    scheduler.submit(paced)
    assert [s for s, _ in scheduler.plan(NOW).chunks] == [paced]
    assert scheduler.best_effort_preemptions == 1


def test_reserved_slots_are_refilled_with_preempted_sequences() -> None:
    # In every step the prompt of a paced sequence waits.
    scheduler, preempted = full_of_best_effort(40, output=60, max_num_batched_tokens=64)
    for number in range(40):
        scheduler.submit(SimulatedSequence(f"p{number}", 20, 300, PACE_S))
    for step in range(3000):
        scheduler.submit(SimulatedSequence(f"c{step}", 60, 1, PACE_S))
        scheduler.finish(scheduler.plan(NOW + 0.03 * step))
    ended = sum(s.generated == s.output_tokens for s in preempted)
    assert ended > 3, "two at a time; each needs 60 tokens, in a twentieth of the steps"
