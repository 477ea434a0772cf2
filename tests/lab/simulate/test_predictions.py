"""Predicted output lengths of the simulator."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab.simulate.predictions import PredictedLength, predict
from lab.workload import WorkloadRequest, make_workload

PREDICTORS = ("oracle", "noise:0.5", "constant", "reversed", "shipped", "shipped:2", "shipped:0.01")
SHAREGPT = make_workload("sharegpt", qps=10, requests=4000, seed=11)


def of_lengths(*lengths: int) -> list[WorkloadRequest]:
    return [WorkloadRequest(i / 10, 50, length, 1.0, 0.05, 1) for i, length in enumerate(lengths)]


def tokens(predictor: str, workload: list[WorkloadRequest], seed: int = 0) -> np.ndarray:
    return np.array([predicted.tokens for predicted in predict(predictor, workload, seed)])


def true(workload: list[WorkloadRequest]) -> np.ndarray:
    return np.array([request.output_tokens for request in workload], dtype=float)


def concordance(left: np.ndarray, right: np.ndarray) -> float:
    """Return an estimate of Kendall's tau-a from pairs at three distances in the list."""
    shifts = [1, 7, len(left) // 2]
    pairs = [np.sign(left[s:] - left[:-s]) * np.sign(right[s:] - right[:-s]) for s in shifts]
    return float(np.mean(np.concatenate(pairs)))


def test_oracle_predicts_true_lengths() -> None:
    assert predict("oracle", of_lengths(1, 500, 30), 7) == [PredictedLength(n, n) for n in (1.0, 500.0, 30.0)]


def test_constant_predicts_median_and_p90() -> None:
    workload = of_lengths(*range(1, 102))
    assert set(predict("constant", workload, 3)) == {PredictedLength(51.0, 91.0)}


def test_noise_is_log_normal_around_true_lengths() -> None:
    errors = np.log(tokens("noise:0.5", SHAREGPT) / true(SHAREGPT))
    longer = errors[true(SHAREGPT) > 20]  # predictions of short lengths are clipped to one token
    assert longer.mean() == pytest.approx(0, abs=0.04)
    assert longer.std() == pytest.approx(0.5, abs=0.03)


def test_zero_noise_equals_oracle() -> None:
    assert predict("noise:0", SHAREGPT[:50], 1) == predict("oracle", SHAREGPT[:50], 1)


@pytest.mark.parametrize(
    ("predictor", "tolerance"), [("noise:0.5", 0.02), ("constant", 0.02), ("reversed", 0.02), ("shipped", 0.05)]
)
def test_p90_covers_ninety_percent_of_answers(predictor: str, tolerance: float) -> None:
    p90 = np.array([predicted.p90 for predicted in predict(predictor, SHAREGPT, 0)])
    assert float((true(SHAREGPT) <= p90).mean()) == pytest.approx(0.9, abs=tolerance)


def test_shipped_errors_lie_between_random_and_exact() -> None:
    assert 0.2 < concordance(tokens("shipped", SHAREGPT), true(SHAREGPT)) < 0.8
    assert concordance(tokens("noise:0.1", SHAREGPT), true(SHAREGPT)) > 0.9


def test_shipped_predictions_have_the_scale_of_the_workload() -> None:
    long, short = of_lengths(*range(1000, 1400)), of_lengths(*range(1, 40))
    assert 1000 <= tokens("shipped", long).min() <= tokens("shipped", long).max() <= 1399
    assert 1 <= tokens("shipped", short).min() <= tokens("shipped", short).max() <= 39


def test_shipped_factor_scales_predictions() -> None:
    right, twice, half = (tokens(predictor, SHAREGPT) for predictor in ("shipped", "shipped:2", "shipped:0.5"))
    assert twice == pytest.approx(2 * right)
    assert half == pytest.approx(np.maximum(right / 2, 1.0))
    p90 = np.array([predicted.p90 for predicted in predict("shipped", SHAREGPT, 0)])
    assert np.array([predicted.p90 for predicted in predict("shipped:2", SHAREGPT, 0)]) == pytest.approx(2 * p90)
    assert predict("shipped:1", SHAREGPT, 3) == predict("shipped", SHAREGPT, 3)


def test_reversed_swaps_longest_and_shortest() -> None:
    assert tokens("reversed", of_lengths(1, 500, 30, 40)).tolist() == [500, 1, 40, 30]
    assert concordance(tokens("reversed", SHAREGPT), true(SHAREGPT)) < -0.9
    assert sorted(tokens("reversed", SHAREGPT)) == sorted(true(SHAREGPT))


@given(
    st.sampled_from(PREDICTORS),
    st.lists(st.integers(1, 4000), min_size=1, max_size=30),
    st.integers(0, 2**31),
    st.booleans(),
)
def test_predictions_are_finite_and_at_least_one_token(
    predictor: str, lengths: list[int], seed: int, same: bool
) -> None:
    workload = of_lengths(*(lengths[:1] * len(lengths) if same else lengths))
    predictions = predict(predictor, workload, seed)
    assert len(predictions) == len(workload)
    assert all(1 <= p.tokens <= p.p90 < math.inf for p in predictions)
    assert predictions == predict(predictor, workload, seed)


@pytest.mark.parametrize("predictor", ["noise:0.5", "shipped", "shipped:2"])
def test_errors_depend_on_seed(predictor: str) -> None:
    assert predict(predictor, SHAREGPT[:40], 1) != predict(predictor, SHAREGPT[:40], 2)


@pytest.mark.parametrize("predictor", PREDICTORS)
def test_empty_workload_has_no_predictions(predictor: str) -> None:
    assert predict(predictor, [], 0) == []


@pytest.mark.parametrize("predictor", ["", "magic", "oracle:1", "constant:5", "reversed:2", "Oracle", "noises"])
def test_unknown_predictor_raises_with_accepted_values(predictor: str) -> None:
    with pytest.raises(ValueError, match="unknown predictor") as raised:
        predict(predictor, of_lengths(5), 0)
    accepted = (
        "shipped, shipped:FACTOR (such as shipped:2), oracle, noise:SIGMA (such as noise:0.5), constant or reversed"
    )
    assert str(raised.value).endswith(f"choose {accepted}")


@pytest.mark.parametrize(
    "predictor", ["noise", "noise:", "noise:much", "noise:-1", "noise:10", "noise:nan", "noise:inf"]
)
def test_invalid_sigma_raises(predictor: str) -> None:
    with pytest.raises(ValueError, match=r"noise:SIGMA needs a number from 0 to below 10, such as noise:0\.5"):
        predict(predictor, of_lengths(5), 0)


@pytest.mark.parametrize(
    "predictor", ["shipped:", "shipped:x", "shipped:0", "shipped:-2", "shipped:1000", "shipped:nan"]
)
def test_invalid_factor_raises(predictor: str) -> None:
    with pytest.raises(ValueError, match=r"shipped:FACTOR needs a number above 0 and below 1000, such as shipped:2"):
        predict(predictor, of_lengths(5), 0)
