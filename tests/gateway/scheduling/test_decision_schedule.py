"""When the next decision is due: after changes, at a recheck, and never before a hold ends."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.policies.base import MAX_DECISION_INTERVAL_S, Decision
from gateway.scheduling.decision_schedule import MAX_DECIDING_SHARE, DecisionSchedule

NOW = 50.0


def after(decision: Decision, *, busy: bool = True) -> DecisionSchedule:
    """Return the schedule after ``decision`` at `NOW`."""
    schedule = DecisionSchedule()
    schedule.on_decision(NOW, decision, busy)
    return schedule


def test_first_decision_is_due_at_once() -> None:
    assert DecisionSchedule().is_due(NOW)


@pytest.mark.parametrize(
    ("recheck_s", "due_s"), [(None, MAX_DECISION_INTERVAL_S), (9.0, MAX_DECISION_INTERVAL_S), (0.01, 0.01), (0.0, 0.0)]
)
def test_next_decision_is_due_at_the_recheck_or_after_the_interval(recheck_s: float | None, due_s: float) -> None:
    schedule = after(Decision(recheck_at=None if recheck_s is None else NOW + recheck_s))
    assert schedule.due_s == NOW + due_s
    assert schedule.is_due(NOW + due_s)
    assert not schedule.is_due(NOW + due_s - 1e-6)


def test_change_in_a_busy_engine_is_due_when_the_hold_ends() -> None:
    schedule = after(Decision(hold_s=0.05))
    assert schedule.due_s == NOW + MAX_DECISION_INTERVAL_S, "without a change the hold is no reason to decide"
    schedule.on_change(busy=True)
    assert schedule.due_s == pytest.approx(NOW + 0.05)


def test_change_without_a_hold_is_due_at_once() -> None:
    schedule = after(Decision())
    schedule.on_change(busy=True)
    assert schedule.is_due(NOW)


def test_change_in_an_engine_that_is_not_busy_ends_the_hold() -> None:
    schedule = after(Decision(hold_s=0.05))
    schedule.on_change(busy=False)
    assert schedule.is_due(NOW)
    schedule.on_change(busy=True)
    assert schedule.is_due(NOW), "the hold does not come back"


def test_decision_in_an_engine_that_is_not_busy_holds_nothing() -> None:
    schedule = after(Decision(hold_s=0.05), busy=False)
    schedule.on_cost(NOW, 1.0, busy=False)
    schedule.on_change(busy=True)
    assert schedule.is_due(NOW)


def test_each_decision_replaces_the_hold() -> None:
    schedule = after(Decision(hold_s=0.05))
    schedule.on_decision(NOW + 0.01, Decision(), busy=True)
    schedule.on_change(busy=True)
    assert schedule.is_due(NOW + 0.01)


def test_recheck_waits_for_the_hold() -> None:
    schedule = after(Decision(recheck_at=NOW + 0.01, hold_s=0.05))
    assert schedule.due_s == pytest.approx(NOW + 0.05)


def test_hold_longer_than_the_interval_delays_the_next_decision() -> None:
    schedule = after(Decision(hold_s=2 * MAX_DECISION_INTERVAL_S))
    assert schedule.due_s == pytest.approx(NOW + 2 * MAX_DECISION_INTERVAL_S)


@pytest.mark.parametrize(
    ("cost_s", "hold_s", "held_s"),
    [
        (0.03 * MAX_DECIDING_SHARE, 0.0, 0.03),
        (1.0, 0.0, 0.05),  # at most max_hold_s
        (0.03 * MAX_DECIDING_SHARE, 0.04, 0.04),  # a hold is never shortened
        (0.03 * MAX_DECIDING_SHARE, 0.02, 0.03),
    ],
)
def test_slow_decision_holds_the_next_one_longer(cost_s: float, hold_s: float, held_s: float) -> None:
    schedule = after(Decision(hold_s=hold_s, max_hold_s=0.05))
    schedule.on_cost(NOW, cost_s, busy=True)
    schedule.on_change(busy=True)
    assert schedule.due_s == pytest.approx(NOW + held_s)


@pytest.mark.parametrize(
    ("cost_s", "hold_s", "held_s"),
    [
        (0.002, 0.0, 0.004),  # at most half of the time is spent deciding
        (0.002, 0.03, 0.004),  # nor is there a step to wait for
        (1e-6, 0.0, 2e-6),
    ],
)
def test_engine_without_prompts_ends_the_holds(cost_s: float, hold_s: float, held_s: float) -> None:
    schedule = after(Decision(hold_s=hold_s, max_hold_s=0.05))
    schedule.on_cost(NOW, cost_s, busy=True)
    schedule.on_drained()
    assert schedule.due_s == pytest.approx(NOW + held_s, abs=1e-9)
    schedule.on_change(busy=True)
    assert schedule.due_s == pytest.approx(NOW + held_s, abs=1e-9)


SECONDS = st.floats(0, 0.3)
DECISIONS = st.builds(
    lambda recheck_s, hold_s, max_hold_s: Decision(
        recheck_at=None if recheck_s is None else NOW + recheck_s, hold_s=hold_s, max_hold_s=max_hold_s
    ),
    st.none() | SECONDS,
    SECONDS,
    SECONDS,
)


@given(DECISIONS, st.booleans(), st.floats(0, 0.01), st.lists(st.booleans(), max_size=5))
def test_schedule_equals_its_definition(decision: Decision, busy: bool, cost_s: float, changes: list[bool]) -> None:
    schedule = after(decision, busy=busy)
    schedule.on_cost(NOW, cost_s, busy)
    hold_s = max(decision.hold_s, min(cost_s / MAX_DECIDING_SHARE, decision.max_hold_s))
    held_until_s = NOW + hold_s if busy else -math.inf
    recheck_at = math.inf if decision.recheck_at is None else decision.recheck_at
    due_s = max(min(NOW + MAX_DECISION_INTERVAL_S, recheck_at), held_until_s)
    assert schedule.due_s == pytest.approx(due_s)
    for change_busy in changes:
        schedule.on_change(change_busy)
        if not change_busy:
            held_until_s = -math.inf
        due_s = min(due_s, held_until_s)
        assert schedule.due_s == pytest.approx(due_s)
