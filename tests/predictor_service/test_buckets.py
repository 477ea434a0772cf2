import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from predictor_service.model.buckets import PAPER_BINS, STRATEGIES, Buckets, fit_buckets, off_by
from predictor_service.model.length_model import Prediction
from predictor_service.training.evaluate import bucket_study

lengths = st.lists(st.integers(1, 5000), min_size=1, max_size=200).map(lambda some: np.array(some, float))


@given(lengths, st.sampled_from(PAPER_BINS), st.sampled_from(STRATEGIES))
def test_every_length_lies_within_the_bin_that_it_is_placed_in(some, count, strategy):
    buckets = fit_buckets(some, count, strategy)
    assert (np.diff(buckets.edges) > 0).all()
    assert buckets.count == count if strategy == "equal-width" else buckets.count <= count
    slots = buckets.place(some)
    assert (buckets.edges[slots] <= some).all()
    assert (some < buckets.edges[slots + 1]).all()


def test_equal_width_bins_are_as_wide_and_equal_frequency_bins_as_full_as_each_other():
    some = np.random.default_rng(0).exponential(200, 5000).round() + 1
    assert np.ptp(np.diff(fit_buckets(some, 20, "equal-width").edges)) == pytest.approx(0, abs=1e-6)
    full = np.bincount(fit_buckets(some, 20, "equal-frequency").place(some))
    assert full.min() > 0.8 * full.max()


def test_lengths_beyond_the_range_fall_into_the_outer_bins():
    buckets = Buckets(np.array([0.0, 10, 20]))
    assert buckets.place(np.array([-1.0, 0, 10, 500])).tolist() == [0, 0, 1, 1]


def test_quantiles_are_read_off_the_distribution_evenly_within_a_bin():
    buckets = Buckets(np.array([0.0, 10, 30]))
    shares = np.array([[0.5, 0.5], [1.0, 0.0], [0.0, 1.0]])
    assert buckets.quantiles(shares, 0.5).tolist() == [10.0, 5.0, 20.0]
    assert buckets.quantiles(shares, 0.75).tolist() == [20.0, 7.5, 25.0]


def test_too_little_to_cut_is_said():
    with pytest.raises(ValueError, match="at least 2 bins"):
        fit_buckets(np.array([5.0]), 1, "equal-width")
    with pytest.raises(ValueError, match="one token"):
        fit_buckets(np.array([]), 10, "equal-width")


def test_guesses_at_most_so_many_bins_away_are_counted():
    guessed, actual = np.array([1, 2, 3, 9]), np.array([1, 3, 1, 1])
    assert [off_by(guessed, actual, most) for most in (0, 1, 2)] == [0.25, 0.5, 0.75]


def test_the_bucket_study_of_an_oracle_is_right_in_every_bin_and_coarse_only_where_bins_are():
    some = np.random.default_rng(1).uniform(1, 2000, 600).round()
    table = bucket_study([Prediction(x, x, x) for x in some], some, reference=some)
    assert [(row["strategy"], row["asked_bins"]) for row in table] == [(s, n) for s in STRATEGIES for n in PAPER_BINS]
    assert all(row["accuracy"] == row["off_by_2"] == 1.0 for row in table)
    widths = [row["rmse_tokens"] for row in table if row["strategy"] == "equal-width"]
    assert widths == sorted(widths, reverse=True)
    assert table[0]["kendall_tau"] < table[6]["kendall_tau"] <= 1.0
