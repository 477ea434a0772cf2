"""Fitting one correction to finished answers."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from predictor_service.calibration.corrections import Answers, Correction, fit_correction, survival_quantile
from predictor_service.model.length_model import MAX_TOKENS, Prediction

Z90 = 1.2815515655446004


def answers(
    seed: int, rows: int, *, shift: float = 0.0, slope: float = 1.0, noise: float = 0.6, limit: float = math.inf
):
    """Return predictions and answers of another model: y = shift + slope x + noise, up to ``limit`` tokens."""
    random = np.random.default_rng(seed)
    x = random.uniform(math.log(30), math.log(500), rows)
    s = np.full(rows, Z90 * 0.8)
    y = shift + slope * x + random.normal(0, noise, rows)
    return Answers(x, s, np.minimum(y, math.log(limit)), y < math.log(limit), np.ones(rows))


@pytest.mark.parametrize(("shift", "slope"), [(0.0, 1.0), (-1.5, 1.0), (1.0, 1.0), (2.5, 0.5)])
def test_fit_correction_finds_scale_of_other_model(shift, slope):
    correction = fit_correction(answers(1, 400, shift=shift, slope=slope))
    fresh = answers(2, 4000, shift=shift, slope=slope)
    middle = correction.shift + correction.slope * fresh.x
    assert np.mean(fresh.y <= middle) == pytest.approx(0.5, abs=0.08)
    assert np.mean(fresh.y <= middle + correction.stretch * fresh.s) == pytest.approx(0.9, abs=0.04)


def test_fit_correction_ignores_uninformative_predictions():
    noise = answers(3, 400, shift=5.0, slope=0.0)
    assert fit_correction(noise).slope == 0.0


def test_fit_correction_is_not_biased_by_truncated_answers():
    truncated = answers(4, 600, limit=180)
    assert 0.25 < np.mean(~truncated.complete) < 0.5
    correction, whole = fit_correction(truncated), fit_correction(answers(4, 600))
    typical = Prediction(100.0, 100.0, 230.0)
    assert correction.apply(typical).p50 == pytest.approx(whole.apply(typical).p50, rel=0.25)
    uncensored = fit_correction(
        Answers(truncated.x, truncated.s, truncated.y, np.ones(600, dtype=bool), truncated.weight)
    )
    assert correction.apply(typical).p90 == pytest.approx(whole.apply(typical).p90, rel=0.25)
    assert correction.apply(typical).p90 > uncensored.apply(typical).p90


def test_survival_quantile_matches_hand_computed_values():
    # One of four is truncated at 2. Its mass is shared equally by 3 and 4.
    values, complete = np.array([1.0, 2.0, 3.0, 4.0]), np.array([True, False, True, True])
    quantiles = [survival_quantile(values, complete, np.ones(4), level) for level in (0.25, 0.5, 0.625, 0.7, 1.0)]
    assert quantiles == [1.0, 3.0, 3.0, 4.0, 4.0]
    # A weight of two equals two answers.
    weighted = survival_quantile(np.array([1.0, 2.0]), np.array([True, True]), np.array([2.0, 1.0]), 0.6)
    assert weighted == 1.0


def test_survival_quantile_of_truncated_answers_is_longest():
    assert survival_quantile(np.array([3.0, 5.0]), np.array([False, False]), np.ones(2), 0.9) == 5.0


row_lists = st.lists(
    st.tuples(st.floats(0, 20), st.floats(0.1, 20), st.floats(0, 20), st.booleans(), st.floats(1e-6, 1)),
    min_size=1,
    max_size=40,
)


@given(row_lists, st.floats(1, 1e9), st.floats(1, 1e9))
def test_correction_always_returns_ordered_finite_quantiles(rows, p50, p90):
    correction = fit_correction(Answers(*(np.array(column) for column in zip(*rows, strict=True))))
    corrected = correction.apply(Prediction(p50, p50, max(p50, p90)))
    assert 1 <= corrected.p50 <= corrected.p90 <= MAX_TOKENS * 1.001
    assert corrected.length == corrected.p50


def test_identity_correction_keeps_quantiles():
    assert Correction(1.0, 0.0, 1.0).apply(Prediction(100, 100, 250)).p90 == pytest.approx(250)
