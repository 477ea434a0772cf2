"""The slack policy and those whom nothing was promised: what is left is theirs, a share of it always."""

from __future__ import annotations

import numpy as np
import pytest

from engine_adapter.engine import GateReport
from engine_adapter.gates.best_effort_preemption import PEAK_S
from engine_adapter.gates.slack import BEST_EFFORT_SHARE, SlackGate
from engine_adapter.simulated.sequence import SimulatedSequence
from gateway.policies.slack.batch import NO_HURRY_S, Load
from gateway.policies.slack.policy import Slack
from gateway.requests.request import Request
from tests.fixtures.policy_builders import NOW, admitted, ask, decide, engine, rejected, running


def test_requests_without_bounds_come_last_but_have_a_share_of_the_places_to_themselves() -> None:
    state = engine(max_num_seqs=60)  # a twentieth: three places
    free = [ask(f"free{i}", at=NOW - 9) for i in range(5)]
    bounded = [ask(f"b{i}", ttft=5, tpot=1, prompt=5, at=NOW) for i in range(80)]
    decision = decide(Slack(), NOW, [*free, *bounded], [running("old")], state)
    assert (len(decision.admit), rejected(decision)) == (59, [])
    assert not any(name.startswith("free") for name in admitted(decision))
    room = decide(Slack(), NOW, [*free, *bounded], [], engine(max_num_seqs=200))
    assert admitted(room)[-5:] == [r.id for r in free], "with nobody held back they take what is left"
    tight = [running(f"s{i}", tpot=0.0105) for i in range(4)]
    short = [ask(f"short{i}", at=NOW - 9, prompt=5) for i in range(5)]
    held_back = decide(Slack(), NOW, [*short, ask("x", ttft=50, tpot=0.0105)], tight, state)
    assert admitted(held_back) == ["short0", "short1", "short2"]


def test_best_effort_is_not_refused_and_protects_nobody() -> None:
    greedy = ask("greedy", tpot=1e-6, ttft=1e-6, best_effort=True)
    assert admitted(decide(Slack(), NOW, [greedy], [], engine())) == ["greedy"]
    beside = [running("g", tpot=1e-6, best_effort=True)]
    assert admitted(decide(Slack(), NOW, [ask(tpot=0.05)], beside, engine())) == ["r"]


def test_requests_without_bounds_never_wait_for_ever() -> None:
    # Places are short, bounded requests come without end, and the runway is never empty.
    state, policy = engine(max_num_seqs=4, max_num_batched_tokens=500), Slack(max_wait_s=10.0)
    free = ask("free", prompt=900)
    batch = [running(str(i), tpot=1.0) for i in range(2)] + [running("prefilling", tpot=1.0, prompt=100)]
    batch[-1].first_token_s = None
    for second in range(11):
        crowd = [ask(f"b{second}.{i}", ttft=5, tpot=1, prompt=10, at=NOW + second) for i in range(3)]
        first = admitted(decide(policy, NOW + second, [*crowd, free], batch, state))
        assert first == [f"b{second}.0"]
    crowd = [ask(f"late{i}", ttft=5, tpot=1, prompt=10, at=NOW + 11) for i in range(3)]
    assert admitted(decide(policy, NOW + 11, [*crowd, free], batch, state)) == ["free"]


def test_one_without_bounds_that_does_not_fit_holds_up_its_kind_only_until_these_have_ended() -> None:
    bounded, state = [running(str(i), tpot=1.0) for i in range(6)], engine(max_num_seqs=8)
    many, few = ask("many", sequences=4, at=NOW - 2), [ask(str(i), at=NOW - 1) for i in range(3)]
    for waited in (0, 100):
        assert admitted(decide(Slack(), NOW + waited, [many, *few], bounded, state)) == ["0", "1"][: 1 if waited else 2]
    ending = [*bounded[:5], running("free")]
    assert not decide(Slack(), NOW, [many, *few], ending, state).admit, "or they would be in its way for ever"
    small = engine(max_num_seqs=8, kv_tokens=3000)
    large = ask("large", prompt=2900, at=NOW - 2)
    assert admitted(decide(Slack(), NOW, [large, *few], bounded[:1], small)) == ["0", "1", "2"]


def test_who_has_a_pace_finds_the_places_of_those_without_free_where_they_make_way() -> None:
    free = [running(f"free{i}") for i in range(40)]
    comers = [ask(f"b{i}", ttft=5, tpot=0.5, prompt=1, output=149) for i in range(60)]

    def admits(comers: list[Request], preemptible: bool = True, **limits: int) -> int:
        state = engine(**{"max_num_seqs": 40, **limits}, gate=GateReport(preemptible=preemptible))
        return len(decide(Slack(), NOW, comers, free, state).admit)

    assert admits(comers, preemptible=False) == 0
    assert admits(comers) == 38, "all but the twentieth that is theirs"
    for other in (ask("free"), ask("best effort", ttft=1, tpot=0.5, best_effort=True)):
        assert admits([other]) == 0, "nobody makes way for whom nothing was promised"
    # Now there are places, and memory for one more: all reach 150 tokens.
    assert admits(comers, max_num_seqs=80, kv_tokens=41 * 150, preemptible=False) == 1
    assert admits(comers, max_num_seqs=80, kv_tokens=41 * 150) == 37, "a twentieth of the places is four"
    free[0].prompt_tokens += 10 * 150
    assert admits(comers, max_num_seqs=80, kv_tokens=41 * 150) == 27, "those of the oldest, whatever memory they have"


def test_places_that_others_took_lately_are_left_to_them() -> None:
    policy, state = Slack(), engine(max_num_seqs=10)
    free = [ask(f"free{i}", prompt=5) for i in range(9)]
    busy = [running(f"b{i}", tpot=0.5) for i in range(9)]

    def admits(now: float, others: int) -> int:
        return len(decide(policy, now, free, busy[:others], state).admit)

    decide(policy, NOW, [ask("sixth", ttft=5, tpot=0.5)], busy[:5], state)
    assert admits(NOW + 1, others=2) == 4
    assert admits(NOW + 1, others=0) == 9, "an engine that has nothing else to do takes what it can"
    assert (admits(NOW + 2, others=9), admits(NOW + 3, others=2)) == (1, 1), "a share is theirs"
    assert admits(NOW + 2 + 1.01 * PEAK_S, others=2) == 8


def test_a_request_with_a_deadline_alone_keeps_its_place_and_is_not_one_of_those_without() -> None:
    ttft, free = ask("ttft", ttft=5), [running(f"free{i}") for i in range(40)]
    state = engine(max_num_seqs=40, gate=GateReport(preemptible=True))
    decision = decide(Slack(), NOW, [ttft], free, state)
    assert decision.paces == {"ttft": NO_HURRY_S}, "which is what the step gate is told"
    ttft.admitted_s, ttft.tpot_slo_s = NOW, NO_HURRY_S
    load = Load.of([*free, ttft], 0.01)
    assert (load.slots, load.unbounded, load.strictest) == (41, 40, np.inf)
    assert load.decoding == pytest.approx(41 * BEST_EFFORT_SHARE), "but it sits out as they do"
    assert not SlackGate().preemptible(SimulatedSequence("ttft", 1, 1, ttft.tpot_slo_s))
    kept = [running(f"ttft{i}", ttft=5) for i in range(40)]
    for request in kept:
        request.tpot_slo_s = NO_HURRY_S
    assert not decide(Slack(), NOW, [ask("late", ttft=5, tpot=0.5)], kept, state).admit


def test_one_whose_bound_nobody_insists_on_goes_without_a_pace() -> None:
    queue = [ask("free"), ask("effort", ttft=1, tpot=0.5, best_effort=True), ask("bounded", ttft=5, tpot=0.5)]
    decision = decide(Slack(), NOW, queue, [], engine())
    assert (len(decision.admit), decision.paces) == (3, {"effort": np.inf})
