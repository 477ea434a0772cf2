from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine_adapter.step_time.linear_forms import (
    StepTimes,
    fit_itl,
    fit_prefill,
    fit_quality,
    nonnegative_least_squares,
)
from engine_adapter.step_time.model import StepTimeModel

TRUE = StepTimes(a=4e-8, b=1.5e-4, c=2e-6, d=6e-3, alpha=1e-4, beta=2e-3)


def decode_steps(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    batch = rng.integers(1, 128, count).astype(float)
    length = rng.uniform(50, 3000, count)
    return batch, length, (TRUE.a * batch + TRUE.c) * length + TRUE.b * batch + TRUE.d


def test_fit_itl_recovers_coefficients_of_clean_steps() -> None:
    batch, length, seconds = decode_steps(np.random.default_rng(1), 400)
    assert fit_itl(batch, length, seconds) == pytest.approx((TRUE.a, TRUE.b, TRUE.c, TRUE.d), rel=1e-3)


def test_fit_itl_is_within_3_percent_under_10_percent_noise() -> None:
    rng = np.random.default_rng(2)
    batch, length, seconds = decode_steps(rng, 600)
    fitted = StepTimes(*fit_itl(batch, length, seconds * rng.normal(1, 0.1, 600)))
    for b, n in ((16, 300), (32, 500), (64, 1500), (120, 2800)):
        assert fitted.itl(b, n) == pytest.approx(TRUE.itl(b, n), rel=0.03)


def test_fit_prefill_recovers_a_line() -> None:
    tokens = np.random.default_rng(3).uniform(10, 2048, 200)
    alpha, beta, *_ = fit_prefill(tokens, 1e-4 * tokens + 2e-3)
    assert (alpha, beta) == pytest.approx((1e-4, 2e-3), rel=1e-3)


def test_fit_prefill_finds_the_flat_part_of_short_prompts() -> None:
    tokens = np.random.default_rng(4).uniform(10, 1000, 400)
    seconds = np.where(tokens < 300, 0.012, 1e-4 * tokens + 2e-3)
    alpha, beta, theta, delta = fit_prefill(tokens, seconds)
    fitted = StepTimes(alpha=alpha, beta=beta, theta=theta, delta=delta)
    assert theta == pytest.approx(300, abs=60)
    for tokens_ in (50, 200, 400, 900):
        expected = 0.012 if tokens_ < 300 else 1e-4 * tokens_ + 2e-3
        assert fitted.prefill(tokens_) == pytest.approx(expected, rel=0.1)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_least_squares_is_nonnegative_and_locally_optimal(seed: int) -> None:
    rng = np.random.default_rng(seed)
    columns, target = rng.normal(size=(40, 3)), rng.normal(size=40)
    w = nonnegative_least_squares(columns, target, parsimonious=False)
    assert (w >= 0).all()
    loss = ((columns @ w - target) ** 2).sum()
    for step in rng.normal(scale=0.05, size=(20, 3)):
        other = np.maximum(w + step, 0)
        assert loss <= ((columns @ other - target) ** 2).sum() + 1e-6


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_fit_itl_never_makes_a_larger_batch_faster(seed: int) -> None:
    rng = np.random.default_rng(seed)
    batch, length = rng.integers(1, 64, 50).astype(float), rng.uniform(1, 4000, 50)
    fitted = StepTimes(*fit_itl(batch, length, rng.uniform(1e-3, 0.1, 50)))
    assert fitted.itl(8, 100) <= fitted.itl(9, 100) <= fitted.itl(9, 200)


def test_perfect_fit_has_r2_of_one_and_no_error() -> None:
    seconds = np.array([0.1, 0.2, 0.4])
    quality = fit_quality(seconds, seconds)
    assert (quality.r2, quality.rmse_s, quality.mape, quality.samples) == (1.0, 0.0, 0.0, 3)


def feed(model: StepTimeModel, rng: np.random.Generator, steps: int, slower: float = 1.0) -> None:
    for _ in range(steps):
        batch, context = int(rng.integers(1, 64)), float(rng.uniform(50, 1500))
        prefill = int(rng.integers(16, 1024)) if rng.random() < 0.3 else 0
        seconds = TRUE.itl(batch, context) + (TRUE.prefill(prefill) if prefill else 0.0)
        model.observe(batch, prefill, context, slower * seconds * rng.normal(1, 0.03))


def test_model_fits_both_forms_to_mixed_steps() -> None:
    model = StepTimeModel()
    feed(model, np.random.default_rng(5), 1200)
    assert model.itl(32, 500) == pytest.approx(TRUE.itl(32, 500), rel=0.05)
    assert model.prefill(512) == pytest.approx(TRUE.prefill(512), rel=0.1)
    assert model.itl_quality is not None and model.itl_quality.r2 > 0.9
    assert model.prefill_quality is not None and model.prefill_quality.mape < 0.2


def test_model_follows_a_slower_engine() -> None:
    model, rng = StepTimeModel(), np.random.default_rng(6)
    feed(model, rng, 800)
    feed(model, rng, 1200, slower=1.5)
    assert model.itl(32, 500) == pytest.approx(1.5 * TRUE.itl(32, 500), rel=0.08)


def test_stalled_steps_do_not_change_the_fit() -> None:
    model, rng = StepTimeModel(), np.random.default_rng(7)
    for i in range(640):
        batch = int(rng.integers(1, 64))
        model.observe(batch, 0, 200.0, 2.0 if i % 50 == 0 else TRUE.itl(batch, 200))
    assert model.itl(32, 200) == pytest.approx(TRUE.itl(32, 200), rel=0.02)


def test_initial_times_stay_until_min_samples() -> None:
    model = StepTimeModel(times=TRUE)
    for _ in range(model.min_samples - 1):
        model.observe(4, 0, 100.0, 0.5)
        model.observe(4, 100, 100.0, 0.9)
    model.refit()
    assert model.times == TRUE


@pytest.mark.parametrize("context", [lambda i: 200.0, lambda i: 100.0 + i])
def test_single_request_steps_keep_the_prior_batch_cost(
    context: Callable[[int], float],
) -> None:
    model, rng = StepTimeModel(times=StepTimes(b=3e-4, d=1e-2)), np.random.default_rng(10)
    for i in range(640):
        model.observe(1, 0, context(i), 20e-3 * rng.normal(1, 0.1))
    assert model.itl(1, 300) == pytest.approx(20e-3, rel=0.05)
    assert model.itl(64, 300) == pytest.approx(2 * (64 * 3e-4 + 1e-2), rel=0.25), "the prior, twice as slow"


def test_noisy_steps_of_similar_lengths_give_no_steep_slope() -> None:
    for seed in range(5):
        model, rng = StepTimeModel(times=StepTimes(b=3e-4, d=1e-2)), np.random.default_rng(seed)
        for i in range(model.refit_every):
            model.observe(int(rng.integers(1, 6)), 0, 60.0 + i % 20, 12e-3 * rng.normal(1, 0.15))
        assert model.itl(3, 70) == pytest.approx(12e-3, rel=0.1)
        assert model.itl(3, 1000) < 25e-3


def test_large_batch_fit_survives_many_single_request_steps() -> None:
    model, rng = StepTimeModel(), np.random.default_rng(9)
    feed(model, rng, 1200)
    for i in range(640):
        model.observe(1, 0, 100.0 + i, TRUE.itl(1, 100 + i))
    assert model.itl(64, 500) == pytest.approx(TRUE.itl(64, 500), rel=0.1)


def test_model_with_learn_false_keeps_its_times() -> None:
    model = StepTimeModel(times=TRUE, learn=False)
    feed(model, np.random.default_rng(8), 300)
    assert model.times == TRUE


def test_observe_ignores_steps_without_work_or_time() -> None:
    model = StepTimeModel()
    model.observe(0, 0, 0.0, 0.1)
    model.observe(3, 0, 10.0, 0.0)
    assert model.steps_seen == 0


def test_latest_steps_of_each_kind_come_newest_first() -> None:
    model = StepTimeModel()
    for number in range(1, 6):
        model.observe(number, 0, 100.0, number / 100)
        model.observe(number, 50, 100.0, number / 10)
    assert model.latest(2) == [
        (5.0, 100.0, 0.0, 0.05),
        (4.0, 100.0, 0.0, 0.04),
        (5.0, 100.0, 50.0, 0.5),
        (4.0, 100.0, 50.0, 0.4),
    ]
    assert len(model.latest(100)) == 10


def learned(tokens: np.ndarray, seconds: np.ndarray, prior: StepTimes, refits: int = 30) -> StepTimes:
    """Return ``prior`` after ``refits`` refits to the same prompts."""
    for _ in range(refits):
        alpha, beta, theta, delta = fit_prefill(tokens, seconds, prior)
        prior = StepTimes(alpha=alpha, beta=beta, theta=theta, delta=delta)
    return prior


@pytest.mark.parametrize("tokens", [1, 2, 4])
def test_fit_prefill_attributes_the_time_of_tiny_prompts_to_the_fixed_cost(tokens: int) -> None:
    seconds = np.random.default_rng(tokens).lognormal(np.log(5e-3), 0.2, 100)
    fitted = learned(np.full(100, float(tokens)), seconds, StepTimes())
    assert fitted.alpha == pytest.approx(StepTimes().alpha, rel=0.25)
    assert fitted.prefill(tokens) == pytest.approx(seconds.mean(), rel=0.02)


@pytest.mark.parametrize("token_s", [2e-5, 2e-3])
def test_fit_prefill_attributes_the_time_of_long_prompts_to_their_tokens(token_s: float) -> None:
    seconds = 800 * token_s * np.random.default_rng(5).lognormal(0, 0.05, 100)
    fitted = learned(np.full(100, 800.0), seconds, StepTimes(), refits=1)
    assert fitted.prefill(800) == pytest.approx(800 * token_s, rel=0.02)
    assert fitted.prefill(1600) == pytest.approx(1600 * token_s, rel=0.1)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 2048), min_size=1, max_size=6), st.floats(1e-6, 5e-3), st.floats(0, 0.1),
    st.floats(0, 0.4), st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_fit_prefill_with_a_prior_predicts_what_it_has_seen_and_stays_bounded(
    lengths: list[int], token_s: float, fixed_s: float, noise: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    tokens = np.tile(np.array(lengths, dtype=np.float64), 60)
    seconds = (token_s * tokens + fixed_s) * rng.lognormal(0, noise, len(tokens))
    fitted = learned(tokens, seconds, StepTimes())
    assert 0 <= fitted.alpha * min(lengths) <= 2 * max(seconds.max(), StepTimes().alpha * min(lengths))
    predicted = np.array([fitted.prefill(one) for one in tokens])
    assert predicted.mean() == pytest.approx(seconds.mean(), rel=0.1)
