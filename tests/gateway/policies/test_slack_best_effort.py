"""The slack policy and best-effort requests: they get what is left, and a share of the slots in any case."""

from __future__ import annotations

import pytest

from engine_adapter.gates.slack import SlackGate
from engine_adapter.service_kind import ServiceKind
from engine_adapter.simulated.sequence import SimulatedSequence
from engine_adapter.step_report import GateReport
from gateway.policies.slack.policy import Slack
from gateway.requests.request import Request
from tests.fixtures.policy_builders import NOW, admitted, decide, engine, make_request, rejected, running


def test_best_effort_requests_come_last_but_have_reserved_slots() -> None:
    state = engine(max_num_seqs=60)  # a twentieth of the slots is three
    free = [make_request(f"free{i}", at=NOW - 9) for i in range(15)]
    bounded = [make_request(f"b{i}", ttft=5, tpot=1, prompt=5) for i in range(80)]
    decision = decide(Slack(), NOW, [*free, *bounded], [running()], state)
    assert (len(decision.admit), rejected(decision)) == (59, [])
    assert not any(name.startswith("free") for name in admitted(decision))
    decision = decide(Slack(), NOW, [*free, *bounded], [], engine(max_num_seqs=200))
    assert admitted(decision)[80:] == [r.id for r in free], "they take what is left when no other request waits"
    short = [make_request(f"short{i}", at=NOW - 9, prompt=2) for i in range(5)]
    held_back = make_request("held back", ttft=50, tpot=0.0103)  # a step of five takes 10.5 ms
    batch = [running(str(i), tpot=0.02) for i in range(4)]
    assert admitted(decide(Slack(), NOW, [*short, held_back], batch, state)) == ["short0", "short1", "short2"]


def test_best_effort_requests_wait_in_arrival_order() -> None:
    free = [make_request(name, at=NOW - ago, prompt=5) for name, ago in (("new", 1), ("oldest", 9), ("middle", 5))]
    assert admitted(decide(Slack(), NOW, free, [], engine(max_num_seqs=2))) == ["oldest", "middle"]


def test_best_effort_request_is_never_rejected_and_has_no_pace_to_keep() -> None:
    waived = make_request("waived", tpot=1e-6, ttft=1e-6, bounds_waived=True)
    assert admitted(decide(Slack(), NOW, [waived], [], engine())) == ["waived"]
    beside = [running("waived", tpot=1e-6, bounds_waived=True)]
    assert admitted(decide(Slack(), NOW, [make_request(tpot=0.05)], beside, engine())) == ["r"]


def test_request_with_a_waived_bound_is_admitted_without_a_planned_pace() -> None:
    queue = [
        make_request("free"),
        make_request("waived", ttft=1, tpot=0.5, bounds_waived=True),
        make_request("d", ttft=5),
    ]
    decision = decide(Slack(), NOW, queue, [], engine())
    assert (len(decision.admit), decision.paces) == (3, {})


def test_best_effort_request_never_waits_for_ever() -> None:
    # Slots are short, bounded requests keep arriving, and the prefill lookahead is never empty.
    state, policy = engine(max_num_seqs=4, max_num_batched_tokens=500), Slack(max_wait_s=10.0)
    free = make_request("free", prompt=1200)
    batch = [*(running(str(i), tpot=1.0) for i in range(2)), running("prefilling", tpot=1.0, first_token_s=None)]
    for second in range(12):
        arrivals = [make_request(f"b{i}", ttft=5, tpot=1, prompt=10, at=NOW + second) for i in range(3)]
        first = admitted(decide(policy, NOW + second, [*arrivals, free], batch, state))
        assert first == (["b0"] if second <= 10 else ["free"])


@pytest.mark.parametrize(
    ("waited_s", "tokens", "admits"), [(1, 1, []), (100, 1, ["long"]), (100, 1000, ["long"]), (100, 1001, [])]
)
def test_only_an_overdue_best_effort_prompt_may_exceed_the_lookahead(
    waited_s: float, tokens: int, admits: list[str]
) -> None:
    state = engine(max_num_batched_tokens=500)  # a step of 1 s has time for more, so the lookahead is 1000 tokens
    free = [make_request("long", prompt=5000, at=NOW - waited_s), make_request("next", prompt=1)]
    prefilling = running("prefilling", tpot=1.0, prompt=tokens, first_token_s=None)
    assert admitted(decide(Slack(), NOW, free, [prefilling], state)) == admits


@pytest.mark.parametrize(("waited_s", "first"), [(0, 0), (9, 0), (11, 3)])
def test_overdue_best_effort_requests_go_first_into_reserved_slots(waited_s: float, first: int) -> None:
    state = engine(max_num_seqs=60)
    free = [make_request(f"free{i}", prompt=5, at=NOW - waited_s) for i in range(8)]
    bounded = [make_request(f"b{i}", ttft=5, tpot=1, prompt=5) for i in range(80)]
    names = admitted(decide(Slack(max_wait_s=10.0), NOW, [*free, *bounded], [running(tpot=1.0)], state))
    assert names[:first] == [f"free{i}" for i in range(first)]
    assert len(names) == 59
    assert not any(name.startswith("free") for name in names[first:])


def test_best_effort_request_that_does_not_fit_blocks_others_only_while_its_kind_runs() -> None:
    bounded, state = [running(str(i), tpot=1.0) for i in range(6)], engine(max_num_seqs=8)
    many = make_request("many", sequences=4, at=NOW - 2)
    few = [make_request(str(i), at=NOW - 1) for i in range(3)]
    assert admitted(decide(Slack(), NOW, [many, *few], bounded, state)) == ["0", "1"]
    assert admitted(decide(Slack(), NOW + 100, [many, *few], bounded, state)) == ["0"], "the one reserved slot"
    many_bounded = [running(str(i), tpot=1.0) for i in range(57)]
    assert admitted(decide(Slack(), NOW, [many, *few], many_bounded, engine(max_num_seqs=60))) == ["0", "1", "2"]
    beside_free = [*bounded[:5], running("free")]
    assert not decide(Slack(), NOW, [many, *few], beside_free, state).admit, "it fits once that one has ended"
    large = make_request("large", prompt=2900, at=NOW - 2)
    small_memory = engine(max_num_seqs=60, kv_tokens=3000)
    assert admitted(decide(Slack(), NOW, [large, *few], bounded[:1], small_memory)) == ["0", "1", "2"]


def test_slots_and_memory_of_preemptible_requests_count_as_free() -> None:
    free = [running(f"free{i}") for i in range(40)]
    arrivals = [make_request(f"b{i}", ttft=5, tpot=0.5, prompt=1, output=149) for i in range(60)]

    def admits(arrivals: list[Request], preemptible: bool = True, **limits: int) -> int:
        state = engine(**{"max_num_seqs": 40, **limits}, gate=GateReport(preemptible=preemptible))
        return len(decide(Slack(), NOW, arrivals, free, state).admit)

    assert admits(arrivals, preemptible=False) == 0
    assert admits(arrivals) == 38, "two slots are reserved"
    deadline_only = [make_request(f"d{i}", ttft=50, prompt=1, output=149) for i in range(60)]
    assert admits(deadline_only) == 38, "deadline-only requests preempt, too"
    for other in (make_request("free"), make_request("waived", ttft=1, tpot=0.5, bounds_waived=True)):
        assert admits([other]) == 0, "no request is preempted for a best-effort one"
    # With more slots, memory is short: each request reaches 150 tokens. Four slots are reserved.
    assert admits(arrivals, max_num_seqs=80, kv_tokens=41 * 150, preemptible=False) == 1
    assert admits(arrivals, max_num_seqs=80, kv_tokens=41 * 150) == 37
    free[0].prompt_tokens += 10 * 150
    assert admits(arrivals, max_num_seqs=80, kv_tokens=41 * 150) == 27, "the oldest keep their memory"


def test_deadline_only_request_is_not_preempted() -> None:
    deadline_only = [running(f"d{i}", ttft=5) for i in range(40)]
    assert all(request.kind is ServiceKind.DEADLINE_ONLY for request in deadline_only)
    state = engine(max_num_seqs=40, gate=GateReport(preemptible=True))
    assert not decide(Slack(), NOW, [make_request("late", ttft=5, tpot=0.5)], deadline_only, state).admit
    sequence = SimulatedSequence("d", 1, 1, kind=ServiceKind.DEADLINE_ONLY)
    assert not SlackGate().preemptible(sequence)
