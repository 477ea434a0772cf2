"""Paces that are all but the engine's own: they are kept as long as that costs the others no more than it brings."""

from __future__ import annotations

from engine_adapter.engine import EngineState
from gateway.policies.base import Decision, reject_ttft
from gateway.policies.slack.policy import Slack
from gateway.policies.slack.tight_tpot import _LEAST_KNOWN, DEAR, QUIET_S, WORTH, DearPace
from gateway.requests.request import Request
from tests.fixtures.policy_builders import NOW, admitted, ask, decide, engine, rejected, running

ALONE_S = 0.01
STRICT, LOOSE = 0.9 * ALONE_S / DEAR, 1.1 * ALONE_S / DEAR


def decided(
    paces: DearPace, pace_s: float | None, *, admitted: int = 0, refused: int = 0, infeasible: bool = False,
    best_effort: bool = False, waits: bool = False,
) -> None:  # fmt: skip
    requests = [ask(tpot=pace_s) for _ in range(admitted + refused)]
    if best_effort:
        for request in requests:
            request.serve_at_best_effort()
    gone = [reject_ttft(request, 1.0, 1.0, 0.1, infeasible) for request in requests[admitted:]]
    left = [ask(tpot=STRICT), ask(tpot=LOOSE)] if waits else [ask(tpot=STRICT)]
    paces.note(NOW, Decision(admit=requests[:admitted], reject=gone), left)


def fresh() -> DearPace:
    paces = DearPace()
    assert not looks(paces)
    return paces


def looks(paces: DearPace, now: float = NOW, runs_s: float = STRICT) -> bool:
    """Whether, on a look at it, dear paces are held off."""
    paces.look(now, ALONE_S, [running(tpot=1.0), running(tpot=runs_s)])
    return paces.held_off


def test_dear_paces_are_held_off_when_less_are_served_than_there_are_others() -> None:
    for others_admitted, held_off in ((int(0.9 * WORTH * 100), True), (int(1.1 * WORTH * 100), False)):
        paces = fresh()
        decided(paces, STRICT, refused=100)
        decided(paces, LOOSE, admitted=others_admitted, refused=100 - others_admitted)
        assert looks(paces) == held_off
        assert paces.has(ask(tpot=STRICT))
        assert not paces.has(ask(tpot=LOOSE))
        assert not paces.has(ask())


def test_where_all_that_comes_is_dear_it_is_served_as_well_as_can_be() -> None:
    paces = fresh()
    decided(paces, STRICT, admitted=10, refused=500)
    assert not looks(paces)


def test_as_long_as_none_of_them_runs_they_cost_nothing() -> None:
    paces = fresh()
    decided(paces, LOOSE, refused=200)
    assert not looks(paces, runs_s=LOOSE)
    assert looks(paces)


def test_a_few_decisions_hopeless_requests_best_effort_and_those_without_bounds_say_nothing() -> None:
    paces = fresh()
    decided(paces, LOOSE, refused=_LEAST_KNOWN - 1)
    decided(paces, LOOSE, refused=500, infeasible=True)
    decided(paces, LOOSE, refused=500, best_effort=True)
    decided(paces, None, admitted=500)
    assert not looks(paces)
    decided(paces, LOOSE, refused=1)
    assert looks(paces)


def test_they_are_let_in_again_once_nobody_else_has_had_to_wait_for_a_while() -> None:
    for last in ({"waits": True}, {"refused": 1}):
        paces = fresh()
        decided(paces, LOOSE, admitted=0, refused=200)
        assert looks(paces, NOW)
        paces._waited_s = NOW - 0.9 * QUIET_S
        decided(paces, LOOSE, **last)
        assert looks(paces, NOW + 0.9 * QUIET_S)
        decided(paces, LOOSE, admitted=9)
        decided(paces, STRICT, refused=9)
        assert not looks(paces, NOW + 1.1 * QUIET_S)
        assert not looks(paces, NOW + 1.2 * QUIET_S), "what was before does not count"


def test_what_was_refused_long_ago_does_not_count() -> None:
    paces = fresh()
    decided(paces, LOOSE, refused=200)
    assert not looks(paces, NOW + 86_400)
    assert not looks(paces, NOW + 86_400.1)


def overloaded() -> tuple[Slack, EngineState, list[Request]]:
    """A step with one decode takes 10.1 ms; a dear request runs, and many others are refused."""
    policy, state, runs = Slack(), engine(), [running("dear, but in", tpot=0.012)]
    late = [ask(str(i), ttft=0.5, tpot=1.0, at=NOW - 1) for i in range(200)]
    assert len(decide(policy, NOW, late, runs, state).reject) == 200
    return policy, state, runs


def test_slack_refuses_a_dear_pace_at_once_and_says_which_pace_would_do() -> None:
    policy, state, runs = overloaded()
    dear, easy = ask("dear", ttft=5, tpot=0.012), ask("easy", ttft=5, tpot=0.1)
    assert rejected(decide(Slack(), NOW, [dear, easy], runs, state)) == []
    decision = decide(policy, NOW, [dear, easy], runs, state)
    assert rejected(decision) == ["dear"]
    refusal = decision.reject[0]
    assert (refusal.bound, refusal.infeasible, refusal.retry_after_s) == ("tpot", False, QUIET_S)
    both = decide(policy, NOW, [ask("dear", tpot=0.012, e2e=0.8)], runs, state).reject[0]
    assert both.bound == "tpot", "a longer end-to-end bound would not do"
    would_do = ask("would do", ttft=5, tpot=refusal.attainable_s)
    assert rejected(decide(policy, NOW, [dear, would_do], runs, state)) == ["dear"]


def test_slack_lets_a_dear_pace_in_again_when_the_overload_is_over() -> None:
    policy, state, runs = overloaded()
    later = NOW + 2 * QUIET_S
    dear = ask("dear", ttft=5, tpot=0.012, at=later)
    assert rejected(decide(policy, NOW + 0.9 * QUIET_S, [dear], runs, state)) == ["dear"]
    assert admitted(decide(policy, later, [dear], [], state)) == ["dear"]


def test_whom_slack_holds_off_counts_for_no_floor() -> None:
    policy, state, runs = overloaded()
    assert rejected(decide(policy, NOW, [ask("dear", ttft=5, tpot=0.012, tenant="dear")], runs, state)) == ["dear"]
    assert "dear" not in policy._granted._tenants
