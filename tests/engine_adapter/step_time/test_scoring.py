"""Predicted against actual step times: each step is compared once, with the curve before it was fitted to that step."""

from __future__ import annotations

import pytest

from engine_adapter.step_time.linear_forms import StepTimes
from engine_adapter.step_time.model import StepTimeModel


def test_steps_are_compared_with_the_curve_before_its_fit() -> None:
    model = StepTimeModel(StepTimes(b=0.0, d=0.01, alpha=0.0), refit_every=10)
    for _ in range(10):
        model.observe(1, 0, 10, 0.03)

    assert model.actual_s == pytest.approx(0.3)
    assert model.predicted_s == pytest.approx(0.1, rel=0.05)
    assert model.error_s == pytest.approx(0.2, rel=0.05)

    predicted = model.predicted_s
    for _ in range(10):
        model.observe(1, 0, 10, 0.03)
    # The curve has learned.
    assert model.predicted_s - predicted > 0.2


def test_every_step_of_both_kinds_is_compared_once() -> None:
    model = StepTimeModel(window=64, refit_every=7)
    for number in range(1, 200):
        model.observe(2, 50 if number % 3 == 0 else 0, 100, 0.01)
    model.refit()
    assert model.actual_s == pytest.approx(1.99)


def test_more_new_steps_than_the_window_holds_are_no_error() -> None:
    model = StepTimeModel(window=8, refit_every=32)
    for _ in range(64):
        model.observe(1, 0, 10, 0.01)
    assert model.actual_s <= 0.64


def test_forgotten_steps_are_not_compared() -> None:
    model = StepTimeModel(refit_every=10)
    for _ in range(5):
        model.observe(1, 0, 10, 0.01)
    model.forget()
    for _ in range(5):
        model.observe(1, 0, 10, 0.01)
    assert model.actual_s == pytest.approx(0.05)
