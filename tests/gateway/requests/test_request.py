"""A request's service kind, pace and deadline, as its bounds imply them."""

from __future__ import annotations

import math

import pytest
from hypothesis import given

from engine_adapter.service_kind import ServiceKind
from gateway.requests.request import BEST_EFFORT_PACE_S, Request
from tests.fixtures.policy_builders import NOW, WAITING, make_request


@pytest.mark.parametrize(
    ("bounds", "kind", "pace_s", "ttft_s"),
    [
        ({}, ServiceKind.BEST_EFFORT, None, math.inf),
        ({"ttft": 2.0}, ServiceKind.DEADLINE_ONLY, None, 2.0),
        ({"tpot": 0.05}, ServiceKind.PACED, 0.05, math.inf),
        ({"ttft": 2.0, "tpot": 0.05}, ServiceKind.PACED, 0.05, 2.0),
        # 100 tokens at 30 ms take three quarters of 4 s, but a half at most is for the first token.
        ({"e2e": 4.0}, ServiceKind.PACED, 0.03, 1.0),
        ({"e2e": 4.0, "tpot": 0.02, "ttft": 0.5}, ServiceKind.PACED, 0.02, 0.5),
        ({"e2e": 40.0}, ServiceKind.PACED, 0.2, 20.0),
    ],
)
def test_kind_pace_and_deadline_follow_from_the_bounds(
    bounds: dict[str, float], kind: ServiceKind, pace_s: float | None, ttft_s: float
) -> None:
    request = make_request(output=100, **bounds)
    assert (request.kind, request.ttft_slo_s, request.deadline_s) == (kind, pytest.approx(ttft_s), NOW + ttft_s)
    assert request.pace_s == (None if pace_s is None else pytest.approx(pace_s))


@given(WAITING)
def test_pace_is_finite_and_only_paced_or_waived_requests_have_one(request: Request) -> None:
    if request.pace_s is None:
        assert request.kind is not ServiceKind.PACED
    else:
        assert math.isfinite(request.pace_s)
        assert request.kind is ServiceKind.PACED or request.bounds_waived


@pytest.mark.parametrize(("tpot", "pace_s"), [(0.05, BEST_EFFORT_PACE_S), (3.0, 3.0), (None, None)])
def test_waived_bounds_leave_a_best_effort_request(tpot: float | None, pace_s: float | None) -> None:
    request = make_request(ttft=1.0, tpot=tpot)
    request.serve_at_best_effort()
    assert (request.kind, request.deadline_s, request.pace_s) == (ServiceKind.BEST_EFFORT, math.inf, pace_s)
    assert request.slo.ttft_s == 1.0, "the SLO report still needs the bound"


def test_request_that_waits_again_gets_its_own_pace_back() -> None:
    request = make_request(tpot=0.05, admitted_s=NOW, unobserved=True)
    request.pace_s = 0.04
    request.wait_again()
    assert (request.pace_s, request.admitted_s, request.unobserved) == (0.05, None, False)


def test_new_prediction_changes_the_implied_pace() -> None:
    request = make_request(e2e=40.0, output=100)
    assert request.pace_s == pytest.approx(0.2)
    request.predict(1000, 1100)
    assert request.pace_s == pytest.approx(0.03)
    assert request.deadline_s == pytest.approx(NOW + 10.0)


def test_request_that_waits_again_keeps_what_was_predicted_beyond_its_p90() -> None:
    request = make_request()
    request.predict(10, 20, (400.0, 500.0))
    request.wait_again()
    request.advance(20)
    assert request.predicted_tokens > 300


def test_restored_bounds_are_those_that_were_waived() -> None:
    request = make_request(ttft=1.0, tpot=0.1)
    before = (request.kind, request.pace_s, request.deadline_s)
    request.serve_at_best_effort()
    assert (request.kind, request.pace_s, request.deadline_s) != before
    request.restore_bounds()
    assert (request.kind, request.pace_s, request.deadline_s) == before
