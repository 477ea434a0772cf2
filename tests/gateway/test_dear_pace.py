"""Paces that are all but the engine's own: they are kept as long as that costs the others no more than it brings."""

from __future__ import annotations

from test_policies import NOW, admitted, ask, decide, engine, rejected, running

from engine_adapter.engine import EngineState
from gateway.policies.base import Decision, reject_ttft
from gateway.policies.dear_pace import _LEAST_KNOWN, DEAR, QUIET_S, WORTH, DearPace
from gateway.policies.slack import Slack
from gateway.request import Request

ALONE_S = 0.01
STRICT, LOOSE = 0.9 * ALONE_S / DEAR, 1.1 * ALONE_S / DEAR


def decided(paces: DearPace, pace_s: float | None, *, admitted: int, refused: int, hopeless: bool = False) -> None:
    requests = [ask(tpot=pace_s) for _ in range(admitted + refused)]
    gone = [reject_ttft(request, 1.0, 1.0, 0.1, hopeless) for request in requests[admitted:]]
    paces.note(Decision(admit=requests[:admitted], reject=gone))


def paces(*, now: float = NOW) -> DearPace:
    found = DearPace()
    found.look(now, ALONE_S)
    assert not found.held_off
    return found


def test_dear_paces_are_held_off_when_less_are_served_than_there_are_others() -> None:
    for others_admitted, held_off in ((int(0.9 * WORTH * 100), True), (int(1.1 * WORTH * 100), False)):
        found = paces()
        decided(found, STRICT, admitted=0, refused=100)
        decided(found, LOOSE, admitted=others_admitted, refused=100 - others_admitted)
        found.look(NOW, ALONE_S)
        assert found.held_off == held_off
        assert STRICT < found.below_s < LOOSE


def test_where_all_that_comes_is_dear_it_is_served_as_well_as_can_be() -> None:
    found = paces()
    decided(found, STRICT, admitted=10, refused=500)
    found.look(NOW, ALONE_S)
    assert not found.held_off


def test_a_few_decisions_and_hopeless_requests_say_nothing() -> None:
    found = paces()
    decided(found, LOOSE, admitted=0, refused=_LEAST_KNOWN - 1)
    decided(found, LOOSE, admitted=0, refused=500, hopeless=True)
    found.look(NOW, ALONE_S)
    assert not found.held_off
    decided(found, LOOSE, admitted=0, refused=1)
    found.look(NOW, ALONE_S)
    assert found.held_off


def test_they_are_let_in_again_once_nobody_else_has_had_to_wait_for_a_while() -> None:
    found = paces()
    decided(found, LOOSE, admitted=0, refused=200)
    found.others_wait(NOW)
    for after, held_off in ((0.0, True), (0.9 * QUIET_S, True), (1.1 * QUIET_S, False)):
        found.look(NOW + after, ALONE_S)
        assert found.held_off == held_off
    found.look(NOW + 1.2 * QUIET_S, ALONE_S)
    assert not found.held_off, "what was before does not count"


def held_off(policy: Slack, state: EngineState, now: float = NOW) -> None:
    """Refuse many, as an overload does."""
    late: list[Request] = [ask(str(i), ttft=0.5, tpot=1.0, at=now - 1) for i in range(200)]
    assert len(decide(policy, now, late, [running("old", tpot=1.0)], state).reject) == 200


def test_slack_refuses_a_dear_pace_at_once_and_says_which_pace_would_do() -> None:
    # A step with one decode takes 10.1 ms.
    policy, state = Slack(), engine()
    dear, easy = ask("dear", ttft=5, tpot=0.012), ask("easy", ttft=5, tpot=0.1)
    assert rejected(decide(policy, NOW, [dear, easy], [running("old", tpot=1.0)], state)) == []
    held_off(policy, state)
    decision = decide(policy, NOW, [dear, easy], [running("old", tpot=1.0)], state)
    assert rejected(decision) == ["dear"]
    refusal = decision.reject[0]
    assert (refusal.bound, refusal.hopeless, refusal.retry_after_s) == ("tpot", False, QUIET_S)
    would_do = ask("would do", ttft=5, tpot=1.001 * refusal.attainable_s)
    assert rejected(decide(policy, NOW, [would_do], [running("old", tpot=1.0)], state)) == []
    later = NOW + 2 * QUIET_S
    assert admitted(decide(policy, later, [ask("dear", ttft=5, tpot=0.012, at=later)], [], state)) == ["dear"]
