"""The books of one engine: a request waits, runs, or is gone."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_adapter.engine import EngineState
from engine_adapter.step_time.linear_forms import StepTimes
from engine_adapter.step_time.model import StepTimeModel
from gateway.policies.base import LOOK_AGAIN_S, Decision, reject_ttft
from gateway.policies.fcfs import Fcfs
from gateway.policies.registry import POLICIES, make_policy
from gateway.requests.request import Request
from gateway.requests.slo import Slo
from gateway.scheduling.admission import AdmissionController

TIMES = StepTimes(b=1e-4, d=0.01, alpha=1e-3)
NOW = 50.0


def engine(**changes: object) -> EngineState:
    return EngineState(alive=True, step_time=StepTimeModel(times=TIMES, learn=False), **changes)


def ask(name: str, *, at: float = NOW, ttft: float | None = None, tpot: float | None = None, prompt: int = 100,
        group: str = "chat", output: float = 20) -> Request:  # fmt: skip
    return Request(name, group, at, Slo(ttft, tpot), prompt, output)


@dataclass
class Scripted:
    """Does with each that waits what ``does`` says: admit, reject, or anything else to keep it."""

    does: Callable[[Request], str]
    name: str = "scripted"
    gate: str = "open"

    def order(self, request: Request) -> tuple[float, ...]:
        return (request.deadline_s,)

    def decide(
        self, now: float, waiting: Sequence[Request], running: Collection[Request], engine: EngineState
    ) -> Decision:
        decision = Decision(recheck_at=now + 9)
        for request in waiting:
            if self.does(request) == "admit":
                decision.admit.append(request)
            elif self.does(request) == "reject":
                decision.reject.append(reject_ttft(request, 2.0, 2.0, 1.0, False))
        return decision


def admission(
    does: Callable[[Request], str], turns: Callable[[Request], bool] = lambda request: False
) -> AdmissionController:
    return AdmissionController(Scripted(does), engine(), turns)


def test_who_is_admitted_runs_and_knows_since_when() -> None:
    books, request = admission(lambda r: "admit"), ask("a", at=NOW - 3)
    books.submit(request)
    assert books.decide(NOW).admit == [request]
    assert (list(books.waiting), list(books.running.values()), request.admitted_s) == ([], [request], NOW)
    assert books.leave(request)
    assert not books.leave(request)
    assert not books.running


def test_who_is_rejected_is_gone() -> None:
    books, request = admission(lambda r: "reject"), ask("a", ttft=1)
    books.submit(request)
    assert [rejection.request for rejection in books.decide(NOW).reject] == [request]
    assert (list(books.waiting), books.running, request.admitted_s) == ([], {}, None)
    assert not books.withdraw(request)


def test_who_is_kept_waits_on_and_may_withdraw() -> None:
    books, request = admission(lambda r: "keep"), ask("a")
    books.submit(request)
    assert books.decide(NOW) == Decision(recheck_at=NOW + 9)
    assert list(books.waiting) == [request]
    assert books.withdraw(request)
    assert not books.withdraw(request)


@dataclass
class Full(Scripted):
    """Admits nobody, and says that there is no room."""

    full: bool = True

    def decide(
        self, now: float, waiting: Sequence[Request], running: Collection[Request], engine: EngineState
    ) -> Decision:
        return Decision(fits=lambda request: not self.full)


@pytest.mark.parametrize("full", [False, True])
def test_a_decision_is_due_when_there_is_news_and_newcomers_to_a_full_engine_are_none(full: bool) -> None:
    books = AdmissionController(Full(lambda r: "keep", full=full), engine())
    assert not books.decides(NOW), "nobody waits"
    old, first, second = ask("old"), ask("1"), ask("2")
    books.running[old.id] = old
    books.submit(first)
    assert books.decides(NOW)
    books.decide(NOW)
    assert not books.decides(NOW + LOOK_AGAIN_S / 2), "a step alone is no news"
    assert books.decides(NOW + LOOK_AGAIN_S), "but somebody waits"
    books.submit(second)
    assert books.decides(NOW) == (not full)
    books.decide(NOW)
    for event in (books.makes_room, lambda: books.withdraw(second), lambda: books.leave(old)):
        event()
        assert books.decides(NOW)
        books.decide(NOW)
        assert not books.decides(NOW)


def test_who_comes_once_there_is_room_again_is_decided_on_at_once() -> None:
    policy = Full(lambda r: "keep")
    books, old, waited = AdmissionController(policy, engine()), ask("old"), ask("waited")
    books.running[old.id] = old
    books.submit(waited)
    books.decide(NOW)
    books.withdraw(waited)
    books.leave(old)
    books.submit(ask("new"))
    assert books.decides(NOW)


def test_a_policy_that_wants_to_look_again_sooner_does() -> None:
    books = AdmissionController(Scripted(lambda r: "keep"), engine())
    books.policy.decide = lambda *_: Decision(recheck_at=NOW + 0.01)  # type: ignore[method-assign]
    books.submit(ask("a"))
    books.decide(NOW)
    assert not books.decides(NOW + 0.009)
    assert books.decides(NOW + 0.01)


def standing(
    stands_s: float = 0.05, fits: Callable[[Request], bool] = lambda r: True
) -> tuple[AdmissionController, Request]:
    """One runs, one waits, and what was decided at `NOW` stands."""
    books, old = AdmissionController(Scripted(lambda r: "keep"), engine()), ask("old")
    books.policy.decide = lambda *_: Decision(stands_s=stands_s, fits=fits)  # type: ignore[method-assign]
    books.running[old.id] = old
    books.submit(ask("waits"))
    books.decide(NOW)
    return books, old


def test_while_a_decision_stands_news_can_wait() -> None:
    for event in (lambda b: b.submit(ask("new")), lambda b: b.makes_room()):
        books, _ = standing()
        event(books)
        assert not books.decides(NOW + 0.049)
        assert books.decides(NOW + 0.051)
    books, _ = standing()
    assert not books.decides(NOW + 0.051), "there is no news"
    books, _ = standing(stands_s=2 * LOOK_AGAIN_S)
    assert not books.decides(NOW + 1.5 * LOOK_AGAIN_S)


def test_a_decision_does_not_stand_before_an_idle_engine_nor_for_a_newcomer_who_finds_nobody_waiting() -> None:
    books, old = standing()
    books.leave(old)
    assert books.decides(NOW), "the engine is idle"
    books, _ = standing()
    assert books.withdraw(next(iter(books.waiting)))
    books.submit(ask("new"))
    assert books.decides(NOW), "nobody waits any more"
    books, old = standing(fits=lambda request: False)
    books.running["another"] = ask("another")
    books.withdraw(next(iter(books.waiting)))
    books.leave(old)
    books.submit(ask("new"))
    assert books.decides(NOW), "it did not fit before another ended"
    books = AdmissionController(Scripted(lambda r: "keep"), engine())
    books.policy.decide = lambda now, waiting, *_: Decision(admit=list(waiting), stands_s=9.0)  # type: ignore[method-assign]
    books.submit(ask("a"))
    books.decide(NOW)
    books.rest_until(NOW + 9)
    books.submit(ask("b"))
    assert books.decides(NOW), "nobody waited"


def test_no_decision_stands_that_turned_somebody_to_best_effort() -> None:
    books = AdmissionController(Scripted(lambda r: "reject" if r.slo.tpot_s else "keep"), engine(), lambda r: True)
    decide = books.policy.decide
    books.policy.decide = lambda *seen: replace(decide(*seen), stands_s=0.05)  # type: ignore[method-assign]
    books.running["old"] = ask("old")
    books.submit(ask("strict", tpot=0.001))
    books.decide(NOW)
    assert books.decides(NOW)


def test_at_best_effort_a_rejected_request_waits_on_without_its_bounds() -> None:
    books = admission(lambda r: "reject", lambda r: r.slo_class == "patient")
    patient, strict, later = ask("p", ttft=1, group="patient"), ask("s", ttft=2), ask("l", ttft=3, group="patient")
    for request in (patient, strict, later):
        books.submit(request)
    decision = books.decide(NOW)
    assert [rejection.request.id for rejection in decision.reject] == ["s"]
    assert decision.recheck_at == NOW, "without its bounds it may be admitted at once"
    assert [r.id for r in books.waiting] == ["p", "l"]
    assert all(r.best_effort and r.deadline_s == math.inf for r in books.waiting)


def test_at_best_effort_a_request_stands_where_its_policy_puts_one_without_a_deadline() -> None:
    books = admission(lambda r: "reject" if r.id == "late" else "keep", lambda r: True)
    for request in (ask("late", ttft=1), ask("soon", ttft=2)):
        books.submit(request)
    books.decide(NOW)
    assert [r.id for r in books.waiting] == ["soon", "late"]


def test_best_effort_is_turned_once_and_then_rejected_for_good() -> None:
    books = admission(lambda r: "reject", lambda r: True)
    books.submit(ask("a", ttft=1))
    assert books.decide(NOW).reject == []
    (rejection,) = books.decide(NOW).reject
    assert (rejection.request.id, len(books.waiting)) == ("a", 0)


def test_the_work_ahead_is_what_waits_and_what_has_no_token_yet() -> None:
    books = AdmissionController(Fcfs(), engine())
    for request in (ask("done", prompt=500), ask("begun", prompt=300)):
        books.submit(request)
    books.decide(NOW)
    books.running["done"].first_token_s = NOW
    books.submit(ask("new", prompt=200))
    assert books.queued_prefill_s() == pytest.approx(0.2)
    assert books.load() == (pytest.approx(0.5), 3)


EVENTS = st.lists(
    st.tuples(st.sampled_from(["submit", "submit", "decide", "withdraw", "leave", "token"]), st.integers(0, 99)),
    max_size=40,
)
BOUNDS = [(None, None), (0.15, None), (1.0, 0.02), (5.0, 0.001), (0.05, 0.5)]


@pytest.mark.parametrize("name", POLICIES)
@given(events=EVENTS, seqs=st.integers(1, 5), turn=st.booleans())
def test_under_every_policy_a_request_waits_runs_or_is_gone_and_is_told_once(
    name: str, events: list[tuple[str, int]], seqs: int, turn: bool
) -> None:
    books = AdmissionController(make_policy(name), engine(max_num_seqs=seqs), lambda r: turn)
    known: list[Request] = []
    admitted: list[str] = []
    gone: list[str] = []
    for number, (event, pick) in enumerate(events):
        one = known[pick % len(known)] if known else ask("nobody")
        now = NOW + number / 10
        if event == "submit":
            ttft, tpot = BOUNDS[pick % len(BOUNDS)]
            known.append(ask(str(number), at=now, ttft=ttft, tpot=tpot, prompt=1 + pick * 5))
            books.submit(known[-1])
        elif event == "decide":
            decision = books.decide(now)
            admitted += [r.id for r in decision.admit]
            gone += [rejection.request.id for rejection in decision.reject]
        elif event == "token" and one.id in books.running:
            one.first_token_s, one.generated = one.first_token_s or now, one.generated + 1
        elif (event == "withdraw" and books.withdraw(one)) or (event == "leave" and books.leave(one)):
            gone.append(one.id)
        slots = [{r.id for r in books.waiting}, set(books.running), set(gone)]
        assert sum(map(len, slots)) == len(known), "nobody is in two places"
        assert set().union(*slots) == {r.id for r in known}
        assert len(set(gone)) == len(gone)
        assert len(set(admitted)) == len(admitted)
        assert set(admitted) == {r.id for r in known if r.admitted_s is not None}
