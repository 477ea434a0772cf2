"""Admission to one engine: a submitted request waits, runs, or is gone, and changes make a decision due."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_adapter.engine import EngineState
from engine_adapter.step_report import StepReport
from gateway.policies.base import MAX_DECISION_INTERVAL_S, Decision, reject_ttft
from gateway.policies.fcfs import Fcfs
from gateway.policies.registry import POLICIES, make_policy
from gateway.requests.request import Request
from gateway.scheduling.admission import AdmissionController
from tests.fixtures.policy_builders import NOW, admitted, engine, make_request, rejected, running

Action = Callable[[Request], str]


@dataclass
class Scripted:
    """Does what ``action`` says with each waiting request: "admit", "reject" or "keep"."""

    action: Action = lambda request: "keep"
    hold_s: float = 0.0
    paces: dict[str, float] = field(default_factory=dict)
    name: str = "scripted"
    gate: str = "open"

    def order(self, request: Request) -> tuple[float, ...]:
        return (request.deadline_s,)

    def decide(
        self, now: float, waiting: Sequence[Request], running: Collection[Request], engine: EngineState
    ) -> Decision:
        decision = Decision(recheck_at=now + 9, hold_s=self.hold_s, paces=self.paces)
        for request in waiting:
            if self.action(request) == "admit":
                decision.admit.append(request)
            elif self.action(request) == "reject":
                decision.reject.append(reject_ttft(request, 2.0, 2.0, 1.0, False))
        return decision


def controller(
    action: Action = lambda request: "keep",
    serves_best_effort: Callable[[Request], bool] = lambda request: False,
    **options: float,
) -> AdmissionController:
    return AdmissionController(Scripted(action, **options), engine(), serves_best_effort)


# --- decisions --------------------------------------------------------------------------------------------------------


def test_admitted_request_runs_until_it_leaves() -> None:
    admission, request = controller(lambda r: "admit"), make_request(at=NOW - 3)
    admission.submit(request)
    assert admission.decide(NOW).admit == [request]
    assert (list(admission.waiting), list(admission.running.values())) == ([], [request])
    assert request.admitted_s == NOW
    assert admission.leave(request)
    assert not admission.leave(request)
    assert not admission.running


def test_admitted_request_gets_the_pace_of_the_decision() -> None:
    admission = AdmissionController(Scripted(lambda r: "admit", paces={"planned": 0.04}), engine())
    planned, other = make_request("planned", tpot=0.05), make_request("other", tpot=0.06)
    for request in (planned, other):
        admission.submit(request)
    admission.decide(NOW)
    assert (planned.pace_s, other.pace_s) == (0.04, 0.06)


def test_rejected_request_is_gone() -> None:
    admission, request = controller(lambda r: "reject"), make_request(ttft=1)
    admission.submit(request)
    assert [rejection.request for rejection in admission.decide(NOW).reject] == [request]
    assert (list(admission.waiting), admission.running, request.admitted_s) == ([], {}, None)
    assert not admission.withdraw(request)


def test_waiting_request_may_withdraw() -> None:
    admission, request = controller(), make_request()
    admission.submit(request)
    assert admission.decide(NOW) == Decision(recheck_at=NOW + 9)
    assert list(admission.waiting) == [request]
    assert admission.withdraw(request)
    assert not admission.withdraw(request)


def test_work_ahead_is_the_prefill_that_waits_or_is_unfinished() -> None:
    admission = AdmissionController(Fcfs(), engine())
    for request in (make_request("decoding", prompt=500), make_request("prefilling", prompt=300)):
        admission.submit(request)
    admission.decide(NOW)
    admission.running["decoding"].first_token_s = NOW
    admission.submit(make_request("waiting", prompt=200))
    assert admission.expected_batch(NOW).prefill_s == pytest.approx(0.5)


# --- best effort ------------------------------------------------------------------------------------------------------


def test_rejected_request_of_a_best_effort_class_waits_without_its_bounds() -> None:
    admission = controller(lambda r: "reject", lambda r: r.slo_class == "patient")
    for request in (
        make_request("p", ttft=1, slo_class="patient"),
        make_request("s", ttft=2),
        make_request("l", ttft=3, slo_class="patient"),
    ):
        admission.submit(request)
    decision = admission.decide(NOW)
    assert rejected(decision) == ["s"]
    assert decision.recheck_at == NOW, "without its bounds it may be admitted at once"
    assert [r.id for r in admission.waiting] == ["p", "l"]
    assert all(r.bounds_waived and r.deadline_s == math.inf for r in admission.waiting)


def test_waived_request_moves_to_its_new_place_in_the_queue() -> None:
    admission = controller(lambda r: "reject" if r.id == "late" else "keep", lambda r: True)
    for request in (make_request("late", ttft=1), make_request("soon", ttft=2)):
        admission.submit(request)
    admission.decide(NOW)
    assert [r.id for r in admission.waiting] == ["soon", "late"]


def test_best_effort_request_is_rejected_for_good() -> None:
    admission = controller(lambda r: "reject", lambda r: True)
    admission.submit(make_request(ttft=1))
    assert admission.decide(NOW).reject == []
    assert rejected(admission.decide(NOW)) == ["r"]
    assert not admission.waiting


# --- when a decision is due -------------------------------------------------------------------------------------------


def held(hold_s: float = 0.05) -> tuple[AdmissionController, Request]:
    """Return a controller that decided at `NOW` and holds the next decision: one request runs, "waits" waits."""
    admission, old = controller(hold_s=hold_s), make_request("old")
    admission.running[old.id] = old
    admission.submit(make_request("waits"))
    admission.decide(NOW)
    return admission, old


def test_no_decision_is_due_while_no_request_waits() -> None:
    admission = controller()
    assert not admission.decision_due(NOW)
    admission.running["old"] = make_request("old")
    admission.capacity_changed()
    assert not admission.decision_due(NOW)


def test_decision_is_due_after_each_change_and_after_the_interval() -> None:
    admission, old = held(hold_s=0.0)
    assert not admission.decision_due(NOW + MAX_DECISION_INTERVAL_S / 2)
    assert admission.decision_due(NOW + MAX_DECISION_INTERVAL_S)
    second = make_request("second")
    changes = [
        lambda: admission.submit(second),
        admission.capacity_changed,
        lambda: admission.withdraw(second),
        lambda: admission.leave(old),
    ]
    for change in changes:
        change()
        assert admission.decision_due(NOW)
        admission.decide(NOW)
        assert not admission.decision_due(NOW)


def test_changes_wait_for_the_hold_of_a_busy_engine() -> None:
    changes: list[Callable[[AdmissionController], object]] = [
        lambda admission: admission.submit(make_request("new")),
        lambda admission: admission.capacity_changed(),
    ]
    for change in changes:
        admission, _ = held()
        change(admission)
        assert not admission.decision_due(NOW + 0.049)
        assert admission.decision_due(NOW + 0.051)


def test_idle_engine_ends_the_hold() -> None:
    admission, old = held()
    admission.leave(old)
    assert admission.decision_due(NOW)


def test_arrival_at_an_empty_queue_ends_the_hold() -> None:
    admission, _ = held()
    assert admission.withdraw(admission.waiting[0])
    admission.submit(make_request("new"))
    assert admission.decision_due(NOW)


def test_decision_that_leaves_no_request_waiting_holds_nothing() -> None:
    admission = controller(lambda r: "admit", hold_s=9.0)
    admission.submit(make_request("a"))
    admission.decide(NOW)
    assert admission.running
    admission.submit(make_request("b"))
    assert admission.decision_due(NOW)


def test_waived_bounds_are_decided_at_once() -> None:
    admission = controller(lambda r: "reject" if r.slo.ttft_s else "keep", lambda r: True, hold_s=0.05)
    admission.running["old"] = make_request("old")
    admission.submit(make_request("strict", ttft=0.001))
    admission.decide(NOW)
    assert admission.decision_due(NOW)


# --- every policy -----------------------------------------------------------------------------------------------------

EVENTS = st.lists(
    st.tuples(st.sampled_from(["submit", "submit", "decide", "withdraw", "leave", "token"]), st.integers(0, 99)),
    max_size=40,
)
BOUNDS = [(None, None), (0.15, None), (1.0, 0.02), (5.0, 0.001), (0.05, 0.5)]


@pytest.mark.parametrize("name", POLICIES)
@given(events=EVENTS, slots=st.integers(1, 5), best_effort=st.booleans())
def test_request_waits_runs_or_is_gone_under_every_policy(
    name: str, events: list[tuple[str, int]], slots: int, best_effort: bool
) -> None:
    """INVARIANT: a request is in exactly one of these, and is admitted or rejected at most once."""
    admission = AdmissionController(make_policy(name), engine(max_num_seqs=slots), lambda r: best_effort)
    submitted: list[Request] = []
    admissions: list[str] = []
    gone: list[str] = []
    for number, (event, pick) in enumerate(events):
        one = submitted[pick % len(submitted)] if submitted else make_request("never submitted")
        now = NOW + number / 10
        if event == "submit":
            ttft, tpot = BOUNDS[pick % len(BOUNDS)]
            request = make_request(str(number), at=now, ttft=ttft, tpot=tpot, prompt=1 + pick * 5, output=20)
            submitted.append(request)
            admission.submit(request)
        elif event == "decide":
            decision = admission.decide(now)
            admissions += admitted(decision)
            gone += rejected(decision)
        elif event == "token" and one.id in admission.running:
            one.first_token_s, one.generated = one.first_token_s or now, one.generated + 1
        elif (event == "withdraw" and admission.withdraw(one)) or (event == "leave" and admission.leave(one)):
            gone.append(one.id)
        places = [{r.id for r in admission.waiting}, set(admission.running), set(gone)]
        assert sum(map(len, places)) == len(submitted), "no request is in two of them"
        assert set().union(*places) == {r.id for r in submitted}
        assert len(set(gone)) == len(gone)
        assert len(set(admissions)) == len(admissions)
        assert set(admissions) == {r.id for r in submitted if r.admitted_s is not None}


# --- when a request leaves a full queue -------------------------------------------------------------------------------


def full_queue(waited_s: float, *old: Request, **engine_changes: Any) -> float:
    """Seconds until a request leaves the queue of three prompts of 0.1 s beside ``old``."""
    admission = AdmissionController(Scripted(), engine(**engine_changes))
    admission.running.update({request.id: request for request in old})
    for index in range(3):
        admission.submit(make_request(str(index), at=NOW - waited_s))
    return admission.next_admission_in_s(NOW)


def test_next_admission_at_an_idle_engine_takes_the_prefill_work() -> None:
    assert full_queue(0.0) == pytest.approx(0.3)


def test_next_admission_without_a_free_slot_takes_the_first_end_too() -> None:
    # Steps took 50 ms each so far; 40 and 90 tokens are left.
    old = [running("a", generated=11, output=51), running("b", generated=11, output=101)]
    assert full_queue(0.0, *old, max_num_seqs=2) == pytest.approx(0.3 + 40 * 0.05, rel=0.01)


def test_next_admission_counts_unfinished_prefills_of_running_requests() -> None:
    prefilling = make_request("a", prompt=2000, output=10, admitted_s=NOW)
    seconds = full_queue(0.0, prefilling, max_num_seqs=1)
    assert 2.3 + 10 * 0.01 < seconds < 2.3 + 10 * 0.02


@pytest.mark.parametrize(("waited_s", "expected_s"), [(0.0, 0.3), (0.25, 0.3), (0.4, 2.3)])
def test_next_admission_with_free_slots_waits_for_an_end_only_if_the_policy_does(
    waited_s: float, expected_s: float
) -> None:
    assert full_queue(waited_s, running("a", generated=11, output=51)) == pytest.approx(expected_s, rel=0.01)


def test_next_admission_after_the_predicted_length_is_one_token_away() -> None:
    overdue = running("a", generated=11, output=5)
    assert full_queue(0.0, overdue, max_num_seqs=1) == pytest.approx(0.3 + 0.05, rel=0.02)


def test_first_end_of_unobserved_requests_counts_their_time() -> None:
    # 150 steps of about 10 ms, of which a second has passed.
    late = make_request("a", at=NOW - 9, output=150, admitted_s=NOW - 1, unobserved=True)
    admission = AdmissionController(Scripted(), engine())
    assert admission.first_end_in_s(NOW) == 0.0
    admission.running["a"] = late
    assert 0.4 < admission.first_end_in_s(NOW) < 0.7
    assert admission.first_end_in_s(NOW + 99) < 0.02


def test_first_end_is_sooner_with_accepted_drafts() -> None:
    late = make_request("a", at=NOW - 9, output=150, admitted_s=NOW - 1, unobserved=True)
    admission = AdmissionController(Scripted(), engine())
    admission.running["a"] = late
    plain_s = admission.first_end_in_s(NOW - 1)
    for _ in range(300):
        admission.engine.acceptance.observe(StepReport(4, 0, 100.0, 0.01, 4, 12, 4, offered_requests=4))
    assert admission.first_end_in_s(NOW - 1) == pytest.approx(plain_s / 2)


def test_request_from_another_engine_has_nothing_cached_on_one_without_a_prefix_cache() -> None:
    admission = controller()
    admission.engine.prefix_caching = False
    request = make_request(prompt=1000, cached_tokens=900, shared_tokens=800)
    admission.submit(request)
    assert (request.uncached_tokens, request.shared_tokens) == (1000, 0)


def test_estimate_of_a_long_queue_reads_none_of_its_requests_again() -> None:
    state = EngineState(alive=True)
    controller = AdmissionController(make_policy("slack"), state)
    requests = [make_request(str(number), at=NOW + number, prompt=1 + number % 900) for number in range(5000)]
    for request in requests:
        controller.submit(request)
    expected = sum(state.step_time.prefill(request.uncached_tokens) for request in requests)
    assert controller.next_admission_in_s(NOW + 9000) == pytest.approx(expected)
    read = 0

    class Counted(type(controller.waiting)):  # type: ignore[misc]
        def __iter__(self) -> Any:
            nonlocal read
            read += 1
            return super().__iter__()

    controller.waiting.__class__ = Counted
    controller.withdraw(requests[7])
    controller.submit(make_request("new", prompt=100))
    controller.next_admission_in_s(NOW + 9000)
    assert read == 0
