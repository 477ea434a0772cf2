"""What a simulated gateway is told of output lengths."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab.simulate.predictions import Predicted, predict
from lab.workload import WorkloadRequest, make_workload

WAYS = ("oracle", "noise:0.5", "constant", "reversed", "shipped", "shipped:2", "shipped:0.01")
SHAREGPT = make_workload("sharegpt", qps=10, requests=4000, seed=11)


def of_lengths(*lengths: int) -> list[WorkloadRequest]:
    return [WorkloadRequest(i / 10, 50, length, 1.0, 0.05, 1) for i, length in enumerate(lengths)]


def tokens(how: str, workload: list[WorkloadRequest], seed: int = 0) -> np.ndarray:
    return np.array([predicted.tokens for predicted in predict(how, workload, seed)])


def true(workload: list[WorkloadRequest]) -> np.ndarray:
    return np.array([asked.output_tokens for asked in workload], dtype=float)


def concordance(left: np.ndarray, right: np.ndarray) -> float:
    """Kendall's tau-a over neighbours and over pairs half the list apart: near enough to tell skill from none."""
    shifts = [1, 7, len(left) // 2]
    pairs = [np.sign(left[s:] - left[:-s]) * np.sign(right[s:] - right[:-s]) for s in shifts]
    return float(np.mean(np.concatenate(pairs)))


def test_the_oracle_tells_the_truth() -> None:
    assert predict("oracle", of_lengths(1, 500, 30), 7) == [Predicted(n, n) for n in (1.0, 500.0, 30.0)]


def test_constant_tells_everybody_the_median_and_the_90th_percentile() -> None:
    workload = of_lengths(*range(1, 102))
    assert set(predict("constant", workload, 3)) == {Predicted(51.0, 91.0)}


def test_noise_is_log_normal_around_the_truth() -> None:
    errors = np.log(tokens("noise:0.5", SHAREGPT) / true(SHAREGPT))
    longer = errors[true(SHAREGPT) > 20]  # shorter ones are cut at one token
    assert longer.mean() == pytest.approx(0, abs=0.04)
    assert longer.std() == pytest.approx(0.5, abs=0.03)


def test_noise_of_nothing_is_the_oracle() -> None:
    assert predict("noise:0", SHAREGPT[:50], 1) == predict("oracle", SHAREGPT[:50], 1)


@pytest.mark.parametrize(
    ("how", "off"), [("noise:0.5", 0.02), ("constant", 0.02), ("reversed", 0.02), ("shipped", 0.05)]
)
def test_about_nine_in_ten_answers_are_no_longer_than_their_90th_percentile(how: str, off: float) -> None:
    p90 = np.array([predicted.p90 for predicted in predict(how, SHAREGPT, 0)])
    assert float((true(SHAREGPT) <= p90).mean()) == pytest.approx(0.9, abs=off)


def test_the_shipped_predictor_knows_something_but_not_everything() -> None:
    assert 0.2 < concordance(tokens("shipped", SHAREGPT), true(SHAREGPT)) < 0.8
    assert concordance(tokens("noise:0.1", SHAREGPT), true(SHAREGPT)) > 0.9


def test_the_shipped_predictors_errors_are_on_the_workloads_own_scale() -> None:
    long, short = of_lengths(*range(1000, 1400)), of_lengths(*range(1, 40))
    assert 1000 <= tokens("shipped", long).min() <= tokens("shipped", long).max() <= 1399
    assert 1 <= tokens("shipped", short).min() <= tokens("shipped", short).max() <= 39


def test_a_scale_that_is_off_leaves_the_order_of_the_shipped_predictor() -> None:
    right, twice, half = (tokens(how, SHAREGPT) for how in ("shipped", "shipped:2", "shipped:0.5"))
    assert twice == pytest.approx(2 * right)
    assert half == pytest.approx(np.maximum(right / 2, 1.0))
    p90 = np.array([predicted.p90 for predicted in predict("shipped", SHAREGPT, 0)])
    assert np.array([predicted.p90 for predicted in predict("shipped:2", SHAREGPT, 0)]) == pytest.approx(2 * p90)
    assert predict("shipped:1", SHAREGPT, 3) == predict("shipped", SHAREGPT, 3)


def test_reversed_tells_the_longest_answer_that_it_is_the_shortest_and_so_on() -> None:
    assert tokens("reversed", of_lengths(1, 500, 30, 40)).tolist() == [500, 1, 40, 30]
    assert concordance(tokens("reversed", SHAREGPT), true(SHAREGPT)) < -0.9
    assert sorted(tokens("reversed", SHAREGPT)) == sorted(true(SHAREGPT))


@given(
    st.sampled_from(WAYS), st.lists(st.integers(1, 4000), min_size=1, max_size=30), st.integers(0, 2**31), st.booleans()
)
def test_one_prediction_a_request_that_is_finite_and_at_least_a_token(
    how: str, lengths: list[int], seed: int, same: bool
) -> None:
    workload = of_lengths(*(lengths[:1] * len(lengths) if same else lengths))
    predictions = predict(how, workload, seed)
    assert len(predictions) == len(workload)
    assert all(1 <= p.tokens <= p.p90 < math.inf for p in predictions)
    assert predictions == predict(how, workload, seed)


@pytest.mark.parametrize("how", ["noise:0.5", "shipped", "shipped:2"])
def test_another_seed_errs_otherwise(how: str) -> None:
    assert predict(how, SHAREGPT[:40], 1) != predict(how, SHAREGPT[:40], 2)


@pytest.mark.parametrize("how", WAYS)
def test_nobody_asked_is_nobody_predicted(how: str) -> None:
    assert predict(how, [], 0) == []


@pytest.mark.parametrize("how", ["", "magic", "oracle:1", "constant:5", "reversed:2", "Oracle", "noises"])
def test_an_unknown_predictor_names_those_there_are(how: str) -> None:
    with pytest.raises(ValueError, match="no predictor is called") as refused:
        predict(how, of_lengths(5), 0)
    there_are = (
        "shipped, shipped:FACTOR (such as shipped:2), oracle, noise:SIGMA (such as noise:0.5), constant or reversed"
    )
    assert str(refused.value).endswith(f"choose {there_are}")


@pytest.mark.parametrize("how", ["noise", "noise:", "noise:much", "noise:-1", "noise:10", "noise:nan", "noise:inf"])
def test_noise_needs_a_sensible_sigma(how: str) -> None:
    with pytest.raises(ValueError, match=r"noise:SIGMA needs a number from 0 to 10, such as noise:0\.5"):
        predict(how, of_lengths(5), 0)


@pytest.mark.parametrize("how", ["shipped:", "shipped:x", "shipped:0", "shipped:-2", "shipped:1000", "shipped:nan"])
def test_a_scale_needs_a_sensible_factor(how: str) -> None:
    with pytest.raises(ValueError, match=r"shipped:FACTOR needs a number above 0 and below 1000, such as shipped:2"):
        predict(how, of_lengths(5), 0)
