"""The circuit breaker: when it opens, how long an engine rests, and how its traffic returns."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from gateway.scheduling.circuit_breaker import (
    FAILURES_TO_OPEN,
    FIRST_REST_S,
    FIRST_SHARE,
    LONGEST_RETRY_AFTER_S,
    PROBE_LIMIT_S,
    SLOW_START_S,
    STATES,
    CircuitBreaker,
)


def opened(at: float = 0.0) -> CircuitBreaker:
    breaker = CircuitBreaker()
    for _ in range(FAILURES_TO_OPEN):
        breaker.on_failure("http_500", at, at)
    assert breaker.state == "open"
    return breaker


def test_circuit_opens_after_failures_in_a_row() -> None:
    breaker = CircuitBreaker()
    assert [breaker.on_failure("lost", 0.0, 0.0) for _ in range(FAILURES_TO_OPEN)] == [False, False, True]
    assert (breaker.state, breaker.reason, breaker.opened) == ("open", "lost", 1)
    assert not breaker.admits(FIRST_REST_S - 0.01)
    assert breaker.admits(FIRST_REST_S)


def test_circuit_is_in_doubt_until_many_successes_follow_a_failure() -> None:
    breaker = CircuitBreaker()
    assert not breaker.in_doubt
    breaker.on_failure("lost", 0.0, 0.0)
    assert breaker.in_doubt
    successes = 0
    while breaker.in_doubt:
        breaker.on_success(1.0, 1.0)
        successes += 1
    assert 10 < successes < 100


def test_success_between_failures_keeps_the_circuit_closed() -> None:
    breaker = CircuitBreaker()
    for now in range(100):
        breaker.on_failure("http_500", now, now)
        breaker.on_success(now, now)
        breaker.on_success(now, now)
    assert breaker.state == "closed"
    assert breaker.share(100) < 0.6, "an engine that fails a third of its requests gets fewer"


def test_high_failure_rate_opens_the_circuit_without_failures_in_a_row() -> None:
    breaker, now = CircuitBreaker(), 0
    while breaker.state == "closed" and now < 100:
        breaker.on_failure("http_500", now, now)
        breaker.on_failure("http_500", now, now)
        breaker.on_success(now, now)
        now += 1
    assert breaker.state == "open"


def test_one_request_probes_and_a_failure_doubles_the_rest() -> None:
    breaker, now, rests = opened(), 0.0, []
    for _ in range(8):
        rests.append(breaker.back_at - now)
        now = breaker.back_at
        assert breaker.due_for_probe(now)
        breaker.on_sent("probe", now)
        assert (breaker.state, breaker.admits(now)) == ("half_open", False)
        assert breaker.on_failure("http_500", now, now)
    assert rests == [1, 2, 4, 8, 16, 30, 30, 30]


def test_probe_that_tells_nothing_lets_the_next_request_probe() -> None:
    breaker = opened()
    breaker.on_sent("first", 1.0)
    breaker.on_dropped("another", 1.5)
    assert not breaker.admits(1.5)
    breaker.on_dropped("first", 2.0)
    assert breaker.due_for_probe(2.0)
    breaker.on_sent("second", 2.0)
    assert breaker.due_for_probe(2.0 + PROBE_LIMIT_S), "a probe without a result is not waited for"


def test_share_grows_after_a_rest_and_the_circuit_closes() -> None:
    breaker = opened()
    breaker.on_sent("probe", 1.0)
    assert breaker.on_success(1.0, 1.1)
    assert breaker.current(1.1) == "recovering"
    shares = [breaker.share(1.1 + SLOW_START_S * part / 4) for part in range(5)]
    assert shares == sorted(shares)
    assert (shares[0], shares[-1]) == (pytest.approx(FIRST_SHARE), 1.0)
    assert breaker.current(1.1 + SLOW_START_S) == "closed"


def test_late_result_of_an_earlier_request_changes_nothing_after_the_rest() -> None:
    breaker = opened(at=10.0)
    assert not breaker.on_success(sent_at=5.0, now=10.5)
    assert breaker.state == "open"
    breaker.on_sent("probe", 11.0)
    assert not breaker.on_failure("http_500", 5.0, 11.1)
    assert breaker.state == "half_open"


def test_forced_request_that_succeeds_ends_the_rest() -> None:
    breaker = opened()
    assert breaker.on_success(sent_at=0.2, now=0.3)
    assert breaker.state == "recovering"


@pytest.mark.parametrize(
    ("asked", "rest"), [(None, FIRST_REST_S), (0.0, FIRST_REST_S), (9.0, 9.0), (1e6, LONGEST_RETRY_AFTER_S)]
)
def test_overload_rests_as_long_as_asked_and_does_not_grow(asked: float | None, rest: float) -> None:
    breaker, now = CircuitBreaker(), 0.0
    for _ in range(3):
        assert breaker.on_overload(now, now, asked)
        assert breaker.back_at - now == rest
        now = breaker.back_at
        breaker.on_sent("probe", now)


def test_streams_that_break_open_the_circuit_although_they_begin() -> None:
    breaker = CircuitBreaker()
    for now in range(FAILURES_TO_OPEN):
        breaker.on_success(now, now)
        breaker.on_failure("cut", now, now, begun=True)
    assert breaker.state == "open"
    breaker = CircuitBreaker()
    for now in range(20):
        breaker.on_success(now, now)
        breaker.on_failure("cut", now, now, begun=True)
        breaker.on_success(now, now)
        breaker.on_completed()
    assert breaker.state == "closed"


class Breaker(RuleBasedStateMachine):
    """Requests are sent, and end in any order and way, while time passes."""

    def __init__(self) -> None:
        super().__init__()
        self.breaker = CircuitBreaker(max_rest_s=30.0)
        self.now, self.sent, self.count = 0.0, dict[str, float](), 0

    @rule(seconds=st.floats(0, 70))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def send(self) -> None:
        was_due = self.breaker.due_for_probe(self.now)
        self.count += 1
        self.sent[str(self.count)] = self.now
        self.breaker.on_sent(str(self.count), self.now)
        assert not was_due or self.breaker.state == "half_open"
        assert not self.breaker.due_for_probe(self.now) or self.breaker.state == "open"

    @precondition(lambda self: self.sent)
    @rule(
        data=st.data(),
        end=st.sampled_from(["ok", "failure", "cut", "overload", "dropped"]),
        asked=st.none() | st.floats(0, 1e9),
    )
    def end(self, data: st.DataObject, end: str, asked: float | None) -> None:
        name = data.draw(st.sampled_from(sorted(self.sent)))
        sent_at, before = self.sent.pop(name), self.breaker.current(self.now)
        if end == "ok":
            ended = self.breaker.on_success(sent_at, self.now)
            assert not ended or before in ("open", "half_open")
        elif end == "overload":
            self.breaker.on_overload(sent_at, self.now, asked)
        elif end in ("failure", "cut"):
            opened = self.breaker.on_failure(end, sent_at, self.now, asked, begun=end == "cut")
            assert not opened or (before != "open" and self.breaker.state == "open")
        self.breaker.on_dropped(name, self.now)

    @invariant()
    def share_is_a_fraction(self) -> None:
        assert 0 < self.breaker.share(self.now) <= 1

    @invariant()
    def exactly_one_state_is_current(self) -> None:
        states = self.breaker.states(self.now)
        assert tuple(states) == STATES
        assert sum(states.values()) == 1

    @invariant()
    def engine_is_never_excluded_for_long(self) -> None:
        limit = max(30.0, LONGEST_RETRY_AFTER_S, PROBE_LIMIT_S)
        assert self.breaker.admits(self.now + limit), "an engine is probed at the latest after its longest rest"

    @invariant()
    def circuit_that_is_not_in_doubt_lets_every_request_through(self) -> None:
        if not self.breaker.in_doubt:
            breaker, now = self.breaker, self.now
            assert breaker.admits(now)
            assert not (breaker.due_for_probe(now) or breaker.suspected(now))
            assert breaker.share(now) == 1

    @invariant()
    def no_engine_is_admitted_during_its_rest(self) -> None:
        if self.breaker.state == "open":
            assert self.breaker.admits(self.now) == (self.now >= self.breaker.back_at)


TestBreaker = Breaker.TestCase
TestBreaker.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
