import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from predictor_service.model.buckets import PAPER_BINS, STRATEGIES, Buckets, fit_buckets, off_by
from predictor_service.model.length_model import Prediction
from predictor_service.training.evaluate import bucket_study

length_arrays = st.lists(st.integers(1, 5000), min_size=1, max_size=200).map(lambda values: np.array(values, float))


@given(length_arrays, st.sampled_from(PAPER_BINS), st.sampled_from(STRATEGIES))
def test_index_of_returns_bin_that_contains_length(lengths, count, strategy):
    buckets = fit_buckets(lengths, count, strategy)
    assert (np.diff(buckets.edges) > 0).all()
    assert buckets.count == count if strategy == "equal-width" else buckets.count <= count
    bins = buckets.index_of(lengths)
    assert (buckets.edges[bins] <= lengths).all()
    assert (lengths < buckets.edges[bins + 1]).all()


def test_fit_buckets_balances_width_or_frequency():
    lengths = np.random.default_rng(0).exponential(200, 5000).round() + 1
    assert np.ptp(np.diff(fit_buckets(lengths, 20, "equal-width").edges)) == pytest.approx(0, abs=1e-6)
    per_bin = np.bincount(fit_buckets(lengths, 20, "equal-frequency").index_of(lengths))
    assert per_bin.min() > 0.8 * per_bin.max()


def test_index_of_clamps_lengths_out_of_range():
    buckets = Buckets(np.array([0.0, 10, 20]))
    assert buckets.index_of(np.array([-1.0, 0, 10, 500])).tolist() == [0, 0, 1, 1]


def test_quantiles_interpolate_within_bin():
    buckets = Buckets(np.array([0.0, 10, 30]))
    probabilities = np.array([[0.5, 0.5], [1.0, 0.0], [0.0, 1.0]])
    assert buckets.quantiles(probabilities, 0.5).tolist() == [10.0, 5.0, 20.0]
    assert buckets.quantiles(probabilities, 0.75).tolist() == [20.0, 7.5, 25.0]


def test_fit_buckets_rejects_too_little_data():
    with pytest.raises(ValueError, match="at least 2 bins"):
        fit_buckets(np.array([5.0]), 1, "equal-width")
    with pytest.raises(ValueError, match="one token"):
        fit_buckets(np.array([]), 10, "equal-width")


def test_off_by_counts_predictions_within_distance():
    predicted, actual = np.array([1, 2, 3, 9]), np.array([1, 3, 1, 1])
    assert [off_by(predicted, actual, distance) for distance in (0, 1, 2)] == [0.25, 0.5, 0.75]


def test_bucket_study_of_oracle_is_limited_by_bin_width_only():
    lengths = np.random.default_rng(1).uniform(1, 2000, 600).round()
    table = bucket_study([Prediction(x, x, x) for x in lengths], lengths, reference=lengths)
    assert [(row["strategy"], row["asked_bins"]) for row in table] == [(s, n) for s in STRATEGIES for n in PAPER_BINS]
    assert all(row["accuracy"] == row["off_by_2"] == 1.0 for row in table)
    widths = [row["rmse_tokens"] for row in table if row["strategy"] == "equal-width"]
    assert widths == sorted(widths, reverse=True)
    assert table[0]["kendall_tau"] < table[6]["kendall_tau"] <= 1.0
