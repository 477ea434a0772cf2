"""One correction, fitted to finished answers."""

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
    """Predictions of a spread of lengths, and what another model made of them: y = shift + slope x + noise."""
    random = np.random.default_rng(seed)
    x = random.uniform(math.log(30), math.log(500), rows)
    s = np.full(rows, Z90 * 0.8)
    y = shift + slope * x + random.normal(0, noise, rows)
    return Answers(x, s, np.minimum(y, math.log(limit)), y < math.log(limit), np.ones(rows))


@pytest.mark.parametrize(("shift", "slope"), [(0.0, 1.0), (-1.5, 1.0), (1.0, 1.0), (2.5, 0.5)])
def test_the_scale_of_another_model_is_found(shift, slope):
    made = fit_correction(answers(1, 400, shift=shift, slope=slope))
    fresh = answers(2, 4000, shift=shift, slope=slope)
    middle = made.shift + made.slope * fresh.x
    assert np.mean(fresh.y <= middle) == pytest.approx(0.5, abs=0.08)
    assert np.mean(fresh.y <= middle + made.stretch * fresh.s) == pytest.approx(0.9, abs=0.04)


def test_a_prediction_that_says_nothing_is_not_listened_to():
    noise = answers(3, 400, shift=5.0, slope=0.0)
    assert fit_correction(noise).slope == 0.0


def test_answers_that_a_limit_cut_off_do_not_shorten_the_correction():
    cut = answers(4, 600, limit=180)
    assert 0.25 < np.mean(~cut.ended) < 0.5
    made, whole = fit_correction(cut), fit_correction(answers(4, 600))
    typical = Prediction(100.0, 100.0, 230.0)
    assert made.apply(typical).p50 == pytest.approx(whole.apply(typical).p50, rel=0.25)
    ignorant = fit_correction(Answers(cut.x, cut.s, cut.y, np.ones(600, dtype=bool), cut.weight))
    assert made.apply(typical).p90 == pytest.approx(whole.apply(typical).p90, rel=0.25)
    assert made.apply(typical).p90 > ignorant.apply(typical).p90


def test_kaplan_meier_by_hand():
    # Of four, one is cut off at 2: the half that 3 and 4 leave goes to them alike.
    values, ended = np.array([1.0, 2.0, 3.0, 4.0]), np.array([True, False, True, True])
    found = [survival_quantile(values, ended, np.ones(4), level) for level in (0.25, 0.5, 0.625, 0.7, 1.0)]
    assert found == [1.0, 3.0, 3.0, 4.0, 4.0]
    # A weight of two is an answer seen twice.
    twice = survival_quantile(np.array([1.0, 2.0]), np.array([True, True]), np.array([2.0, 1.0]), 0.6)
    assert twice == 1.0


def test_where_all_was_cut_off_the_longest_is_all_there_is_to_say():
    assert survival_quantile(np.array([3.0, 5.0]), np.array([False, False]), np.ones(2), 0.9) == 5.0


rows = st.lists(
    st.tuples(st.floats(0, 20), st.floats(0.1, 20), st.floats(0, 20), st.booleans(), st.floats(1e-6, 1)),
    min_size=1,
    max_size=40,
)


@given(rows, st.floats(1, 1e9), st.floats(1, 1e9))
def test_whatever_was_seen_what_is_served_is_a_pair_of_quantiles(seen, p50, p90):
    made = fit_correction(Answers(*(np.array(column) for column in zip(*seen, strict=True))))
    served = made.apply(Prediction(p50, p50, max(p50, p90)))
    assert 1 <= served.p50 <= served.p90 <= MAX_TOKENS * 1.001
    assert served.length == served.p50


def test_no_correction_is_the_identity_on_the_median():
    assert Correction(1.0, 0.0, 1.0).apply(Prediction(100, 100, 250)).p90 == pytest.approx(250)
