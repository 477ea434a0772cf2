"""The slack policy: running requests keep their pace, waiting ones meet their deadlines, and cost decides the order."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_adapter.gates.constants import SLACK
from engine_adapter.service_kind import ServiceKind
from engine_adapter.step_report import GateReport
from engine_adapter.step_time.linear_forms import StepTimes
from engine_adapter.step_time.model import StepTimeModel
from gateway.policies.base import MAX_DECISION_INTERVAL_S
from gateway.policies.running_batch import RunningBatch
from gateway.policies.slack.batch import WaitingBatch
from gateway.policies.slack.policy import Slack
from gateway.requests.progress import Progress
from gateway.requests.request import Request
from gateway.requests.waiting_arrays import WaitingArrays
from gateway.scheduling.admission import AdmissionController
from tests.fixtures.policy_builders import (
    NOW,
    RUNNING,
    WAITING,
    admitted,
    decide,
    engine,
    make_request,
    rejected,
    running,
)


def busy(count: int = 20, **more: Any) -> list[Request]:
    """Return ``count`` decoding requests with long answers. A step of 20 takes 12.1 ms and of 21 12.2 ms, or more."""
    return [running(str(i), **{"output": 10_000, **more}) for i in range(count)]


# --- admission --------------------------------------------------------------------------------------------------------


def test_slack_admits_all_requests_at_light_load() -> None:
    queue = [make_request("a", ttft=1, tpot=0.03), make_request("b", ttft=2, tpot=0.05), make_request("c")]
    decision = decide(Slack(), NOW, queue, [], engine())
    assert (sorted(admitted(decision)), rejected(decision)) == (["a", "b", "c"], [])


def test_slack_admits_no_request_that_breaks_a_running_pace() -> None:
    def admits(strictest: float) -> bool:
        batch = busy(tpot=strictest, prompt=100)
        return bool(decide(Slack(), NOW, [make_request(tpot=1.0, prompt=5)], batch, engine()).admit)

    # A step of 21 sequences takes 10 ms, 0.1 ms for each, and a little for their context: 12.7 ms.
    assert admits(0.0131)
    assert not admits(0.0115)


def test_request_that_does_not_fit_blocks_no_other() -> None:
    queue = [make_request("strict", ttft=5, tpot=0.0125), make_request("loose", ttft=9, tpot=0.5)]
    decision = decide(Slack(), NOW, queue, busy(30, tpot=0.02, prompt=10), engine())
    assert (admitted(decision), rejected(decision)) == (["loose"], [])


def test_idle_engine_admits_any_request() -> None:
    request = make_request(ttft=9, tpot=0.03, prompt=800, output=1)
    assert admitted(decide(Slack(), NOW, [request], [], engine())) == ["r"]


def test_slack_admits_no_prompt_that_would_be_late_beside_running_requests() -> None:
    # Decodes take 12.4 of 14 ms, which leaves a tenth of the time: 20 prompt tokens take 0.2 s.
    batch = busy(tpot=0.014, prompt=100)
    for ttft, admits in ((0.19, []), (0.3, ["r"])):
        request = make_request(ttft=ttft, tpot=1, prompt=20, output=1000)
        decision = decide(Slack(queue_discount=0.1), NOW, [request], batch, engine())
        assert (admitted(decision), rejected(decision)) == (admits, [])


def test_slack_admits_no_more_than_the_kv_memory_is_predicted_to_hold() -> None:
    def admits(tokens: float, kv_tokens: int = 1600) -> int:
        queue = [make_request(str(i), ttft=5, tpot=1, output=tokens) for i in range(10)]
        return len(decide(Slack(), NOW, queue, [], engine(kv_tokens=kv_tokens)).admit)

    assert admits(100) == 8, "each has 100 prompt and 100 output tokens"
    assert admits(100, kv_tokens=0) == 10, "the memory of the engine is unknown"
    assert admits(5000) == 1, "an idle engine gets one request in any case"


def test_cheap_requests_go_first_when_slots_are_short() -> None:
    state = engine(max_num_seqs=3)
    queue = [make_request("long", ttft=5, tpot=1, output=900),
             make_request("short", ttft=5.1, tpot=1, output=20, prompt=10),
             make_request("middle", ttft=5.2, tpot=1, output=200)]  # fmt: skip
    assert admitted(decide(Slack(), NOW, queue, [running()], state)) == ["short", "middle"]
    assert admitted(decide(Slack(cost_weight=0.0), NOW, queue, [running()], state)) == ["long", "short"]


def test_paced_request_without_deadline_is_due_after_max_wait() -> None:
    state = engine(max_num_seqs=2)
    others = [make_request(str(i), ttft=5, tpot=1) for i in range(3)]
    for waited_s, first in ((0.0, "0"), (59.0, "waited")):
        queue = [make_request("waited", tpot=1, at=NOW - waited_s), *others]
        decision = decide(Slack(), NOW, queue, [running()], state)
        assert (admitted(decision), rejected(decision)) == ([first], [])


# --- prefill lookahead ------------------------------------------------------------------------------------------------


def test_prefill_lookahead_bounds_the_prompts_in_the_engine() -> None:
    # A prompt token takes 1 ms. A step takes 12.1 of 40 ms, so it has time for 28 tokens, and so has the next one.
    batch = busy(tpot=0.04, output=1000)
    queue = [make_request(str(i), ttft=5, tpot=1.0, prompt=10) for i in range(20)]
    assert len(decide(Slack(), NOW, queue, batch, engine()).admit) == 5
    assert len(decide(Slack(prefill_lookahead_steps=1.0), NOW, queue, batch, engine()).admit) == 2
    long = make_request("long", ttft=5, tpot=1.0, prompt=90)
    assert admitted(decide(Slack(), NOW, [long], batch, engine())) == ["long"], "no other prompt is in the engine"
    assert len(decide(Slack(), NOW, queue, [], engine()).admit) == 20, "without a pace a step has more time"


def test_lookahead_covers_the_steps_that_the_engine_plans_before_it_sees_a_reaction() -> None:
    batch = busy(tpot=0.04, output=1000)
    queue = [make_request(str(i), ttft=5, tpot=1.0, prompt=10) for i in range(20)]
    late, ahead = engine(reacts_late=True), engine(reacts_late=True, plans_ahead=True)
    assert [len(decide(Slack(), NOW, queue, batch, state).admit) for state in (engine(), late, ahead)] == [5, 8, 11]
    # Prompts that are longer than half a step's budget: the second step must not wait for the first token of the first.
    loose, long = [running("r", tpot=5.0)], [make_request(str(i), ttft=60, tpot=5.0, prompt=1200) for i in range(9)]
    assert [len(decide(Slack(), NOW, long, loose, state).admit) for state in (engine(), late, ahead)] == [3, 5, 6]


def test_unobserved_request_does_not_fill_the_prefill_lookahead() -> None:
    batch, queue = busy(tpot=0.04, output=1000), [make_request(ttft=5, tpot=1.0, prompt=90)]
    unobserved = running("unobserved", tpot=1.0, prompt=400, first_token_s=None)
    assert not decide(Slack(), NOW, queue, [*batch, unobserved], engine()).admit
    Progress(unobserved, lambda: None).on_unobserved()
    assert decide(Slack(), NOW, queue, [*batch, unobserved], engine()).admit


def with_class_behind(policy: Slack, slo_class: str) -> Slack:
    """Let ``policy`` reject many requests of ``slo_class`` and admit many others."""
    late = [make_request(f"late{i}", at=NOW - 9, ttft=1.0, tpot=1.0, slo_class=slo_class) for i in range(60)]
    others = [make_request(str(i), ttft=9, tpot=1.0, prompt=5) for i in range(60)]
    decision = decide(policy, NOW, [*late, *others], [], engine())
    assert (len(decision.reject), len(decision.admit)) == (60, 60)
    return policy


@pytest.mark.parametrize("reason", ["class is behind", "overdue"])
def test_long_prompt_with_a_claim_leads_and_may_exceed_the_lookahead(reason: str) -> None:
    options: dict[str, Any] = {"prefill_lookahead_steps": 4.0}  # 110 tokens
    batch = busy(tpot=0.04, output=1000)
    batch[-1].first_token_s = None  # its prompt of 100 tokens is in the engine
    if reason == "overdue":
        policy, now, ttft = Slack(**options), NOW + 61, None
    else:
        policy, now, ttft = with_class_behind(Slack(**options), "documents"), NOW, 20.0
    short = [make_request(f"short{i}", ttft=2, tpot=1.0, prompt=5, at=now) for i in range(3)]
    long = make_request("long", ttft=ttft, tpot=1.0, prompt=900, slo_class="documents")
    assert "long" not in admitted(decide(Slack(**options), NOW, [*short, long], batch, engine()))
    assert admitted(decide(policy, now, [*short, long], batch, engine())) == ["long"]
    batch[-1].prompt_tokens = 120
    assert not decide(policy, now, [*short, long], batch, engine()).admit, "the lookahead is exceeded already"


# --- rejection --------------------------------------------------------------------------------------------------------


def test_prefill_estimate_grows_with_the_share_of_time_that_decodes_take() -> None:
    # An idle engine needs 0.1 s. Decodes that take half of the pace double that.
    request, policy = make_request(ttft=0.12), Slack(queue_discount=0.8)
    assert rejected(decide(policy, NOW, [request], [], engine())) == []
    (rejection,) = decide(policy, NOW, [request], [running(str(i), tpot=0.025) for i in range(20)], engine()).reject
    assert rejection.predicted_s > 1.5 * 0.1


def test_late_request_is_rejected_with_an_attainable_bound() -> None:
    queue = [make_request(str(i), ttft=0.35, tpot=1.0, at=NOW + i * 1e-6) for i in range(6)]
    decision = decide(Slack(queue_discount=1.0), NOW + 1e-5, queue, [], engine())
    assert rejected(decision) == ["3", "4", "5"]
    for rejection in decision.reject:
        assert (rejection.bound, rejection.infeasible) == ("ttft", False)
        assert rejection.attainable_s > 0.35
        again = make_request("3", ttft=rejection.attainable_s, tpot=1.0, at=NOW + 5e-6)
        assert rejected(decide(Slack(queue_discount=1.0), NOW + 1e-5, [*queue[:3], again], [], engine())) == []


def test_ttft_below_an_idle_prefill_is_infeasible() -> None:
    for ttft, infeasible in ((0.09, True), (0.12, False)):
        (rejection,) = decide(Slack(), NOW, [make_request(ttft=ttft, at=NOW - 1)], [], engine()).reject
        assert (rejection.bound, rejection.infeasible) == ("ttft", infeasible)


def test_pace_below_an_idle_step_is_infeasible() -> None:
    (rejection,) = decide(Slack(), NOW, [make_request(tpot=0.005)], [], engine()).reject
    assert (rejection.bound, rejection.infeasible) == ("tpot", True)


def test_infeasible_rejection_names_a_bound_that_is_accepted() -> None:
    # A step with this request alone takes a little over 10.1 ms.
    policy = Slack()
    (rejection,) = decide(policy, NOW, [make_request(tpot=0.01)], [running()], engine()).reject
    assert (rejection.bound, rejection.infeasible) == ("tpot", True)
    assert rejected(decide(policy, NOW, [make_request(tpot=rejection.attainable_s)], [], engine())) == []


def test_end_to_end_rejections_are_in_terms_of_that_bound() -> None:
    for request, infeasible in (
        (make_request(e2e=0.3, output=100, prompt=10), True),  # 3 ms for each token
        (make_request(e2e=4.0, output=100, prompt=10, at=NOW - 3), False),
    ):
        (rejection,) = decide(Slack(), NOW, [request], [], engine()).reject
        assert (rejection.bound, rejection.infeasible) == ("e2e", infeasible)
        again = make_request(e2e=rejection.attainable_s, output=100, prompt=10, at=request.arrival_s)
        assert rejected(decide(Slack(), NOW, [again], [], engine())) == []


@given(st.lists(st.tuples(st.floats(0.05, 3), st.integers(1, 900)), max_size=30), st.lists(RUNNING, max_size=4),
       st.sampled_from([1.0, 0.5]))  # fmt: skip
def test_rejection_in_one_sweep_equals_rejection_one_by_one(
    bounds: list[tuple[float, int]], old: list[Request], discount: float
) -> None:
    queue = [make_request(f"r{i}", ttft=ttft, tpot=1.0, prompt=prompt) for i, (ttft, prompt) in enumerate(bounds)]
    state = engine()
    batch, curve = RunningBatch(old, state, now=NOW), state.step_time.curve
    token_s, step_s = batch.prefill_token_s / batch.prefill_share, max(batch.step_s, curve.step_s(1, 0))
    in_full_steps, full_token_s = batch.full_steps
    ahead: float = batch.backlog
    late: dict[str, tuple[float, float]] = {}
    for request in sorted(queue, key=lambda request: request.deadline_s):
        tokens = discount * ahead + request.prompt_tokens
        full = min(tokens, in_full_steps)
        first_s = batch.step_s / 2 + step_s + full * full_token_s + (tokens - full) * token_s
        if abs(first_s - request.ttft_slo_s) < 1e-9:
            return  # rounding decides
        if first_s > request.ttft_slo_s:
            late[request.id] = first_s, first_s + (1 - discount) * ahead * token_s + step_s
        else:
            ahead += request.prompt_tokens
    decision = decide(Slack(queue_discount=discount), NOW, queue, old, state)
    assert rejected(decision) == list(late)
    for rejection in decision.reject:
        assert (rejection.predicted_s, rejection.attainable_s) == pytest.approx(late[rejection.request.id])
        assert rejection.retry_after_s == pytest.approx(rejection.predicted_s - rejection.request.ttft_slo_s, abs=1e-9)


@pytest.mark.parametrize(("generated", "admits"), [(140, True), (40, False)], ids=["ahead of its pace", "at its pace"])
def test_long_prompt_is_admitted_in_the_time_that_a_running_request_has_gained(generated: int, admits: bool) -> None:
    # The prompt takes 1.5 s in full steps, but more than 3 s in the time that steps of 20 ms leave.
    old = running(tpot=0.02, generated=generated, output=500, first_token_s=NOW - 0.79)
    request = make_request(ttft=2.2, tpot=1.0, prompt=1500)
    decision = decide(Slack(), NOW, [request], [old], engine())
    assert (admitted(decision), rejected(decision)) == ((["r"], []) if admits else ([], ["r"]))


# --- paces ------------------------------------------------------------------------------------------------------------


def test_requests_with_a_tpot_bound_alone_keep_it_as_their_pace() -> None:
    queue = [
        make_request("a", ttft=9, tpot=0.05),
        make_request("b", ttft=9),
        make_request("c", ttft=9, tpot=0.05, e2e=50.0),
        make_request("d", tpot=1.0),
        make_request("e"),
    ]
    decision = decide(Slack(), NOW, queue, [running()], engine())
    assert sorted(admitted(decision)) == ["a", "b", "c", "d", "e"]
    assert decision.paces == {"c": 0.05}


@given(st.lists(WAITING, min_size=1, max_size=6), st.lists(RUNNING, max_size=6))
def test_planned_pace_is_relaxed_up_to_the_tpot_bound(queue: list[Request], old: list[Request]) -> None:
    for number, request in enumerate([*queue, *old]):
        request.id = str(number)
    state = engine()
    decision, planned = decide(Slack(), NOW, queue, old, state), {}
    for request in decision.admit:
        if request.kind is ServiceKind.PACED and request.slo.e2e_s is not None:
            needed = WaitingBatch.of([request], WaitingArrays.of([request]), NOW)
            tpot_s = math.inf if request.slo.tpot_s is None else request.slo.tpot_s
            planned[request.id] = min(SLACK.e2e_pace_factor * float(needed.pace_s[0]), tpot_s)
    assert decision.paces == {name: pytest.approx(pace_s) for name, pace_s in planned.items()}


def test_end_to_end_bound_plans_with_the_time_left() -> None:
    request = make_request(e2e=4.0, output=100, prompt=100)
    admission = AdmissionController(Slack(), engine())
    admission.submit(request)
    pace_at_arrival_s = request.pace_s
    assert admitted(admission.decide(NOW + 0.5)) == ["r"]
    left_s = (4.0 - 0.5) / 100  # it waited for 0.5 s
    assert request.pace_s == pytest.approx(SLACK.e2e_pace_factor * left_s, rel=1e-3)
    assert pace_at_arrival_s is not None
    assert request.pace_s is not None
    assert request.pace_s > pace_at_arrival_s


def test_tpot_bound_holds_beside_an_end_to_end_bound() -> None:
    admission = AdmissionController(Slack(), engine())
    admission.submit(request := make_request(e2e=4.0, tpot=0.04, output=100, prompt=100))
    assert admitted(admission.decide(NOW)) == ["r"]
    assert request.pace_s == 0.04


def test_end_to_end_pace_is_required_at_admission_and_relaxed_after() -> None:
    # 21 sequences decode in 12.6 ms, 25 in 13.1.
    batch, request = busy(tpot=1.0, prompt=100), make_request()
    for left_ms, admits in ((12.4, []), (12.8, ["r"])):
        request = make_request(e2e=left_ms, output=1000, prompt=5)
        assert admitted(decide(Slack(), NOW, [request], batch, engine())) == admits
    behind = [make_request(str(i), ttft=60, tpot=1.0, output=1000, prompt=5) for i in range(4)]
    assert admitted(decide(Slack(), NOW, [request, *behind], batch, engine())) == ["r", "0", "1", "2", "3"]
    strict = [make_request("r", ttft=6, tpot=0.0128, output=1000, prompt=5), *behind]
    assert len(decide(Slack(), NOW, strict, batch, engine()).admit) < 5


# --- the next decision ------------------------------------------------------------------------------------------------


def test_hold_is_a_step_in_which_all_requests_decode() -> None:
    waiting, decoding = make_request("waiting", ttft=5, tpot=0.1), running(tpot=0.03)
    decision = decide(Slack(), NOW, [waiting], [decoding], engine(max_num_seqs=1))
    assert (decision.admit, decision.hold_s) == ([], pytest.approx(0.0101, abs=2e-5))
    for tokens in (10, 900):
        prefilling = make_request("prefilling", tpot=0.03, prompt=tokens, admitted_s=NOW)
        decision = decide(Slack(), NOW, [waiting], [decoding, prefilling], engine(max_num_seqs=2))
        assert (decision.admit, decision.hold_s) == ([], pytest.approx(0.0102, abs=2e-4)), "its prompt does not count"
    old = running(tpot=1.0, prompt=2_000_000)
    assert decide(Slack(), NOW, [waiting], [old], engine(max_num_seqs=1)).hold_s == MAX_DECISION_INTERVAL_S


@given(st.lists(WAITING, min_size=1, max_size=6), st.lists(RUNNING, max_size=6))
def test_hold_includes_the_admitted_requests(queue: list[Request], old: list[Request]) -> None:
    for number, request in enumerate([*queue, *old]):
        request.id = str(number)
    state = engine()
    decision = decide(Slack(), NOW, queue, old, state)
    after = RunningBatch([*old, *decision.admit], state)
    assert decision.hold_s == pytest.approx(min(after.step_s, MAX_DECISION_INTERVAL_S))
    assert decision.recheck_at is None, "a decision at least every 0.1 s rejects late requests in time"


def test_max_hold_is_the_lookahead_at_the_strictest_pace() -> None:
    for tpot, max_hold_s in ((0.03, 0.06), (0.05, 0.1), (1.0, SLACK.max_hold_s), (None, SLACK.max_hold_s)):
        decision = decide(Slack(), NOW, [make_request(ttft=9)], [running(tpot=tpot)], engine())
        assert decision.max_hold_s == pytest.approx(max_hold_s)


# --- waiting queue ----------------------------------------------------------------------------------------------------


@given(st.lists(WAITING, max_size=12), st.lists(WAITING, max_size=6), st.lists(RUNNING, max_size=6), st.booleans(),
       st.sampled_from([0, 6000]))  # fmt: skip
def test_waiting_queue_is_decided_like_a_plain_list(
    first: list[Request],
    later: list[Request],
    batch: list[Request],
    best_effort: bool,
    kv_tokens: int,
) -> None:
    for number, request in enumerate([*first, *later, *batch]):
        request.id = str(number)
    on_queue, on_list, applied = (Slack(max_wait_s=1.0) for _ in range(3))
    state = engine(max_num_seqs=12, kv_tokens=kv_tokens)
    admission = AdmissionController(applied, state, lambda request: best_effort)
    admission.running = {request.id: request for request in batch}
    for now, arrivals in ((NOW, first), (NOW + 0.5, later), (NOW + 1.5, [])):
        for request in arrivals:
            admission.submit(request)
        listed = on_list.decide(now, list(admission.waiting), list(admission.running.values()), state)
        assert on_queue.decide(now, admission.waiting, list(admission.running.values()), state) == listed
        admission.decide(now)  # changes the queue


@given(st.lists(WAITING, max_size=8), st.lists(RUNNING, min_size=1, max_size=6), st.integers(1, 12), st.booleans(),
       st.sampled_from([0, 6000]))  # fmt: skip
def test_admitted_requests_leave_running_requests_their_pace_slots_and_memory(
    queue: list[Request], old: list[Request], slots: int, preemptible: bool, kv_tokens: int
) -> None:
    """INVARIANT: with each admitted request, the running set keeps its strictest pace, and slots and memory suffice."""
    for number, request in enumerate([*queue, *old]):
        request.id = str(number)
    state = engine(max_num_seqs=slots, kv_tokens=kv_tokens, gate=GateReport(preemptible=preemptible))
    batch = RunningBatch(old, state)
    lookahead = batch.lookahead(2.0).limit
    decision = decide(Slack(), NOW, queue, old, state)
    for request in decision.admit:
        best_effort = request.kind is ServiceKind.BEST_EFFORT
        if batch.backlog:
            assert batch.backlog + (0 if best_effort else request.prompt_tokens) <= lookahead
        batch.add((request,), decision.paces.get(request.id, request.pace_s))
        if best_effort:
            assert batch.slots <= slots
        else:
            assert batch.free_slots >= 0
            assert batch.step_s <= batch.strictest_s * (1 + 1e-9)
        if kv_tokens:
            taken = 0.0 if best_effort else batch.preemptible_memory
            assert batch.memory - taken <= kv_tokens * (1 + 1e-9)


def test_deadline_only_prompts_that_wait_do_not_keep_each_other_out() -> None:
    """Without a pace, a step ends when its token budget is used, however many prompts wait."""
    waiting = [make_request(str(i), ttft=1.0, prompt=200, output=20) for i in range(200)]
    state = engine(step_time=StepTimeModel(StepTimes(d=0.01, alpha=5e-5), learn=False), max_num_seqs=256)
    decision = decide(Slack(), NOW, waiting, [running()], state)
    assert len(admitted(decision)) > 10
