"""What delays a first token beside the prompts ahead: the gateway's own time, and the step under way."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import pytest

from engine_adapter.engine import EngineState
from gateway.policies.slack.policy import Slack
from gateway.requests.request import Request
from gateway.scheduling.admission import AdmissionController
from gateway.scheduling.delays import OVERDUE_FACTOR, OVERDUE_S, note_handover, overdue_s, work_ahead_s
from tests.fixtures.live_gateway import chat, live
from tests.fixtures.policy_builders import NOW, admitted, engine, make_request, rejected, running

STEP_S = 0.0102
"""A step of one request, of about 110 tokens, with the coefficients of `policy_builders.TIMES`."""


def since(seconds: float, **more: Any) -> Request:
    """Return a request that has run for ``seconds``."""
    request = running("old", **more)
    request.admitted_s = NOW - seconds
    return request


def handovers(*seconds: float, state: EngineState | None = None) -> EngineState:
    state = state or engine()
    for value in seconds:
        note_handover(state, value)
    return state


# --- the gateway's own time -------------------------------------------------------------------------------------------


def test_handover_time_follows_the_90th_percentile() -> None:
    rng = random.Random(1)
    state = handovers(*(rng.uniform(0.0, 0.02) for _ in range(3000)))
    assert state.handover_s == pytest.approx(0.018, rel=0.25)


def test_one_stall_changes_the_handover_time_little() -> None:
    state = handovers(*[0.005] * 200)
    before = state.handover_s
    assert handovers(60.0, state=state).handover_s <= 1.2 * before


def test_request_that_the_gateway_would_hand_over_too_late_is_not_admitted() -> None:
    """An idle engine answers after 0.12 s. The bound leaves 30 ms more."""
    for handover_s, expected in ((0.0, ["r"]), (0.02, ["r"]), (0.06, [])):
        controller = AdmissionController(Slack(), engine(handover_s=handover_s))
        controller.submit(make_request(ttft=0.15))
        decision = controller.decide(NOW)
        assert admitted(decision) == expected
        assert rejected(decision) == ([] if expected else ["r"])


def test_handover_time_falls_while_an_idle_engine_rejects() -> None:
    state = engine(handover_s=1.0)
    controller = AdmissionController(Slack(), state)
    for tries in range(500):
        controller.submit(make_request(str(tries), ttft=0.15))
        if admitted(controller.decide(NOW)):
            break
    assert 50 < tries < 300


@dataclass
class Rechecking(Slack):
    """Asks to decide again 2 s after the time that it is given."""

    def decide(self, now, waiting, running, engine):  # type: ignore[no-untyped-def]
        decision = super().decide(now, waiting, running, engine)
        decision.recheck_at = now + 2
        return decision


def test_time_of_the_next_decision_is_not_shifted() -> None:
    controller = AdmissionController(Rechecking(), engine(handover_s=0.5))
    controller.submit(make_request())
    assert controller.decide(NOW).recheck_at == pytest.approx(NOW + 2)


# --- the step under way -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("silent_s", "expected_s"),
    [(0.01, 0.0), (OVERDUE_S, 0.0), (OVERDUE_S + 0.1, OVERDUE_S + 0.1), (4.0, 4.0)],
)
def test_overdue_step_may_take_as_long_again(silent_s: float, expected_s: float) -> None:
    state = engine(last_step_at=NOW - silent_s)
    old = [since(60)]
    assert overdue_s(NOW, old, state) == pytest.approx(expected_s)


def test_step_of_an_engine_that_reports_none_is_never_overdue() -> None:
    assert overdue_s(NOW, [since(60)], engine()) == 0.0


def test_idle_time_does_not_make_a_step_overdue() -> None:
    state = engine(last_step_at=NOW - 60)
    assert overdue_s(NOW, [], state) == 0.0
    assert overdue_s(NOW, [since(0.4)], state) == 0.0
    assert overdue_s(NOW, [since(1.0)], state) == pytest.approx(1.0)


def test_long_prefill_is_not_overdue() -> None:
    """A prompt of 900 tokens takes 0.9 s."""
    state = engine(last_step_at=NOW - 3.0)
    prompt = since(3, prompt=900, generated=0, first_token_s=None)
    assert overdue_s(NOW, [prompt], state) == 0.0
    state.last_step_at = NOW - 10.0
    prompt.admitted_s = NOW - 10.0
    assert OVERDUE_FACTOR * 0.9 < 10.0
    assert overdue_s(NOW, [prompt], state) == pytest.approx(10.0)


def test_request_that_would_wait_for_a_silent_engine_is_not_admitted() -> None:
    for silent_s, expected in ((0.1, ["r"]), (2.0, [])):
        controller = AdmissionController(Slack(), engine(last_step_at=NOW - silent_s))
        controller.running["old"] = since(60)
        controller.submit(make_request(ttft=1.0))
        assert admitted(controller.decide(NOW)) == expected


@pytest.mark.parametrize(("since_step_s", "left_s"), [(0.0, STEP_S), (0.004, STEP_S - 0.004), (0.3, 0.0)])
def test_prediction_counts_what_is_left_of_the_step_under_way(since_step_s: float, left_s: float) -> None:
    state = engine(last_step_at=NOW - since_step_s, handover_s=0.003)
    expected = 0.003 + left_s + STEP_S
    assert work_ahead_s(NOW, [running()], state) == pytest.approx(expected, rel=0.02)


def test_prediction_counts_half_a_step_of_an_engine_that_reports_none() -> None:
    assert work_ahead_s(NOW, [running()], engine()) == pytest.approx(1.5 * STEP_S, rel=0.02)
    assert work_ahead_s(NOW, [], engine()) == 0.0


def test_prediction_counts_the_prompts_in_the_engine() -> None:
    prompt = running(prompt=400, generated=0, first_token_s=None)
    assert work_ahead_s(NOW, [prompt], engine()) > 0.4


async def test_requests_that_the_engine_refuses_do_not_count_as_slow_handovers() -> None:
    async with live() as antares:
        for _ in range(80):
            assert (await antares.ask(chat("word " * 20_000))).status_code == 400
        assert antares.engine.state.handover_s < 0.1
        assert (await antares.ask()).status_code == 200
