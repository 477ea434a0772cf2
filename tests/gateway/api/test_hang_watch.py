"""When an engine that was sent a request counts as hung."""

from __future__ import annotations

import math

import pytest

from gateway.api.failover import HUNG_AFTER, STUCK_AFTER, HangWatch
from gateway.requests.request import Request
from tests.fixtures.policy_builders import engine, make_request, running

SENT_AT = 100.0


def watch(request: Request, *others: Request, timeout_s: float = 10.0, can_move: bool = True) -> HangWatch:
    requests = {r.id: r for r in (request, *others)}
    return HangWatch(request, requests, engine(), timeout_s, SENT_AT, lambda: can_move)


def sent(name: str = "sent", **more: float) -> Request:
    return make_request(name, at=SENT_AT, admitted_s=SENT_AT, prompt=10, **more)


def hung_at(hang_watch: HangWatch, tokens_until: float = 0.0, *others: Request) -> float:
    """Return after how many seconds the engine counts as hung. ``others`` get tokens until ``tokens_until``."""
    now = SENT_AT
    while now < SENT_AT + 1000:
        wait_s = hang_watch.wait_s(now)
        if wait_s == math.inf:
            return math.inf
        assert wait_s > 0
        now += wait_s
        for other in others:
            other.generated += now <= SENT_AT + tokens_until
        if hang_watch.is_hung(now):
            return now - SENT_AT
    return math.inf


def test_silent_engine_is_hung_after_the_timeout() -> None:
    assert hung_at(watch(sent())) == pytest.approx(10)


def test_engine_that_sends_tokens_to_others_is_not_hung_until_later() -> None:
    other = running("other")
    assert hung_at(watch(sent(), other), 22.0, other) == pytest.approx(25)
    assert hung_at(watch(sent(), other), math.inf, other) == pytest.approx(10 * STUCK_AFTER)


def test_long_prefill_is_waited_for() -> None:
    others = [sent(str(number), slo_class="chat") for number in range(200)]
    predicted_s = 201 * 0.01
    assert hung_at(watch(sent(), *others)) >= HUNG_AFTER * predicted_s


@pytest.mark.parametrize(("ttft", "limit"), [(6.0, 3.0), (100.0, 10.0), (0.5, 1.0), (None, 10.0)])
def test_deadline_leaves_half_of_the_time_to_another_engine(ttft: float | None, limit: float) -> None:
    assert hung_at(watch(sent(ttft=ttft))) == pytest.approx(limit)  # type: ignore[arg-type]


def test_request_with_a_token_or_without_observation_is_not_watched() -> None:
    assert hung_at(watch(sent(first_token_s=SENT_AT + 1))) == math.inf
    unobserved = sent()
    unobserved.unobserved = True
    assert hung_at(watch(unobserved)) == math.inf


def test_request_stays_if_no_other_engine_can_serve_it() -> None:
    assert hung_at(watch(sent(), can_move=False)) == math.inf
