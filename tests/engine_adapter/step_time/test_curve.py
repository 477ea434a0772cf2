"""The step curve: fits to observed steps, prefill chunks and the cost of prefill."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine_adapter.step_time.curve import KNOTS, SPENT, StepCurve, refitted
from engine_adapter.step_time.linear_forms import StepTimes
from engine_adapter.step_time.model import StepTimeModel
from engine_adapter.step_time.profile import load_profile

A100 = load_profile("a100-llama3.1-8b")
LINE = A100.step_times()
Steps = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
"""Decodes, summed contexts, prompt tokens and seconds of each step."""


def steps(count: int, seed: int, low: int = 1, high: int = 220, noise: float = 0.05) -> Steps:
    """Steps of an A100 with ``low`` to ``high`` decodes; half of them prefill, as in a full engine."""
    random = np.random.default_rng(seed)
    decodes = random.integers(low, high, count).astype(float)
    context = decodes * random.uniform(200, 600, count)
    prefill = np.where(random.random(count) < 0.5, random.integers(1, 600, count), 0).astype(float)
    true = [A100.step_seconds(int(d), c, int(p), 0) for d, c, p in zip(decodes, context, prefill, strict=True)]
    return decodes, context, prefill, np.array(true) * random.normal(1, noise, count)


def mean_error(curve: StepCurve, of: Steps) -> float:
    """Mean relative error of the curve's step times."""
    predicted = np.array([curve.step_s(d, c, p) for d, c, p in zip(*of[:3], strict=True)])
    return float(np.mean(np.abs(predicted / of[3] - 1)))


def test_initial_curve_equals_the_linear_forms() -> None:
    times = StepTimes(a=1e-7, b=1e-4, d=0.01, alpha=3e-4, beta=0.012)
    curve = StepCurve.of(times)
    assert curve.step_s(20, 20 * 300) == pytest.approx(times.itl(20, 300))
    assert curve.step_s(0, 0, 500) == pytest.approx(times.prefill(500)), "a prompt alone"
    assert curve.step_s(20, 6000, 500) == pytest.approx(times.itl(20, 300) + times.prefill(500) - times.d)
    assert curve.step_s(0, 0, 0) == 0
    several = curve.steps_s(np.array([1.0, 20.0]), np.array([300.0, 6000.0]))
    assert several == pytest.approx([times.itl(1, 300), times.itl(20, 300)])


def test_curve_learns_the_jumps_of_an_a100_from_600_steps() -> None:
    unseen = steps(400, seed=9, noise=0.0)
    curve = StepCurve.of(LINE)
    line = mean_error(curve, unseen)
    curve = refitted(curve, *steps(600, seed=1))
    assert mean_error(curve, unseen) < 0.03
    assert mean_error(curve, unseen) < line / 3


def test_outliers_do_not_change_the_fit() -> None:
    decodes, context, prefill, seconds = steps(600, seed=2, noise=0.02)
    seconds[::15] *= 20
    assert mean_error(refitted(StepCurve.of(LINE), decodes, context, prefill, seconds), steps(300, 3, noise=0.0)) < 0.04


def test_slower_steps_scale_the_whole_curve() -> None:
    known = refitted(StepCurve.of(LINE), *steps(600, seed=4))
    decodes, context, prefill, seconds = steps(100, seed=5, low=100, high=140)
    slower = refitted(known, decodes, context, prefill, 2 * seconds)
    few = steps(300, seed=6, high=60, noise=0.0)
    assert mean_error(slower, (*few[:3], 2 * few[3])) < 0.1


def test_step_time_never_decreases_with_tokens() -> None:
    curve = refitted(StepCurve.of(LINE), *steps(60, seed=7, noise=0.3))
    assert (np.diff(curve.at_knots) >= 0).all()
    assert curve.a >= 0
    assert curve.h >= 0


CURVES = st.builds(
    lambda rises, a, h: StepCurve(0.005 + np.cumsum(rises), a, 0.0, h),
    st.lists(st.floats(1e-6, 0.02), min_size=len(KNOTS), max_size=len(KNOTS)), st.floats(0, 1e-6), st.floats(0, 0.01),
)  # fmt: skip


@settings(max_examples=200)
@given(CURVES, st.integers(0, 300), st.floats(0, 0.5), st.floats(0, 0.5), st.integers(1, 4000))
def test_chunk_uses_at_most_its_share_of_the_time(
    curve: StepCurve, decodes: int, within_s: float, pace_s: float, backlog: int
) -> None:
    chunk = curve.chunk(decodes, 400.0 * decodes, within_s, pace_s, backlog)
    assert 0 <= chunk <= backlog
    alone = curve.step_s(decodes, 400.0 * decodes)
    if chunk:
        assert curve.step_s(decodes, 400.0 * decodes, chunk) <= alone + SPENT * (within_s - alone) + 1e-9


@settings(max_examples=200)
@given(CURVES, st.integers(0, 300), st.floats(0, 0.5), st.integers(1, 4000))
def test_chunk_fills_the_pace_when_slack_is_plenty(curve: StepCurve, decodes: int, pace_s: float, backlog: int) -> None:
    context = 400.0 * decodes
    chunk = curve.chunk(decodes, context, 1e6, pace_s, backlog)
    # Chunks are rounded down to whole tokens.
    assert chunk == backlog or curve.step_s(decodes, context, chunk + 1) >= pace_s - 1e-9


def test_chunk_uses_slack_beyond_the_free_tokens() -> None:
    # 16 tokens are free until the next wave of tiles; further tokens cost 0.2 ms each.
    curve = StepCurve(0.01 + 2e-4 * np.maximum(KNOTS - 32, 0), a=0.0, e=0.0, h=0.0)
    assert curve.chunk(16, 0, within_s=0.05, pace_s=0.02, backlog=1000) == 16 + int(SPENT * 200)
    assert curve.chunk(16, 0, within_s=0.010001, pace_s=0.02, backlog=1000) == 16, "free tokens need no slack"


@given(CURVES, st.integers(0, 300), st.integers(1, 2000))
def test_prefill_cost_is_the_least_slope(curve: StepCurve, decodes: int, prefill: int) -> None:
    knot = float(KNOTS[decodes >= KNOTS][-1])
    cheapest = curve.prefill_token_s(knot, 2048)
    assert cheapest > 0
    if knot + prefill <= 2048:
        added_s = curve.step_s(knot, 0, prefill) - curve.step_s(knot, 0)
        assert cheapest <= added_s / prefill + 1e-12


@given(CURVES, st.floats(0, 2000), st.floats(0, 0.5), st.floats(0, 0.5))
def test_prefill_cost_increases_with_spare_time(curve: StepCurve, decodes: float, less_s: float, more_s: float) -> None:
    costs = [curve.prefill_token_s(decodes, 2048, spare_s) for spare_s in sorted([less_s, more_s])]
    assert costs[0] <= costs[1] + 1e-12


def noisy_curves(a_decode: float, a_token: float) -> list[StepCurve]:
    """Curves learned from steps of 8 ms plus ``a_decode`` and ``a_token`` seconds per token, with 5% noise."""
    curves = []
    for seed in range(10):
        random = np.random.default_rng(seed)
        curve = StepCurve.of(StepTimes())
        for _ in range(3):
            decodes = random.integers(1, 64, 512).astype(float)
            prefill = np.where(random.random(512) < 0.5, random.integers(128, 2000, 512), 0).astype(float)
            seconds = (0.008 + a_decode * decodes + a_token * prefill) * random.normal(1, 0.05, 512)
            curve = refitted(curve, decodes, 300 * decodes, prefill, seconds)
        curves.append(curve)
    return curves


@pytest.mark.parametrize(("a_decode", "a_token"), [(5e-4, 3e-5), (5e-5, 5e-5), (2e-5, 2e-4)])
def test_prefill_cost_is_robust_to_noise(a_decode: float, a_token: float) -> None:
    decodes = np.array([1.0, 8.0, 32.0, 64.0])
    for curve in noisy_curves(a_decode, a_token):
        any_chunk, large = (curve.prefill_tokens_s(decodes, 2048, spare_s) for spare_s in (0.0, 0.02))
        assert (any_chunk >= 0).all(), "small chunks may seem free"
        assert (large > 0.25 * a_token).all()
        assert (large < 2 * (a_token + 0.008 / 2048)).all()


@pytest.mark.parametrize(("a_decode", "a_token"), [(5e-4, 3e-5), (5e-5, 5e-5), (2e-5, 2e-4)])
def test_chunk_grows_with_the_time_for_it_despite_noise(a_decode: float, a_token: float) -> None:
    for curve in noisy_curves(a_decode, a_token):
        chunks = [curve.chunk(32, 9600, within_s, 0.05, 2000) for within_s in np.linspace(0.005, 0.3, 60)]
        assert chunks == sorted(chunks)


def test_scalar_and_array_step_times_agree_for_large_steps() -> None:
    curve = StepCurve.of(LINE)
    several = curve.steps_s(np.array([0.0, 10.0]), np.array([0.0, 3000.0]), np.array([20_000.0, 16_384.0]))
    assert several == pytest.approx([curve.step_s(0, 0, 20_000), curve.step_s(10, 3000, 16_384)])
    assert curve.prefill_token_s(8.0, 32_768) == pytest.approx(LINE.alpha, rel=0.05)


def test_spare_time_is_not_filled_with_almost_free_small_chunks() -> None:
    # Steps of up to 128 tokens take 10 ms; each further token 50 us more.
    curve = replace(StepCurve.of(LINE), at_knots=0.01 + 5e-5 * np.maximum(KNOTS - 128, 0.0), a=0.0, e=0.0, h=0.0)
    small, large = curve.prefill_token_s(16.0, 2048), curve.prefill_token_s(16.0, 2048, 0.03)
    assert small == 0
    # 30 ms hold 112 free tokens and 600 others.
    assert large == pytest.approx(0.03 / 712, rel=0.1)
    assert curve.prefill_token_s(16.0, 2048, np.inf) == pytest.approx((2048 - 128) * 5e-5 / 2032, rel=0.01)
    several = curve.prefill_tokens_s(np.array([16.0, 16.0]), 2048, np.array([0.0, 0.03]))
    assert several == pytest.approx([small, large])


@given(
    CURVES,
    st.floats(0, 9000),
    st.one_of(st.floats(-0.1, 1.0), st.just(math.inf)),
    st.sampled_from([128, 512, 2048, 16_384]),
)
def test_scalar_and_array_prefill_costs_agree(curve: StepCurve, decodes: float, spare_s: float, most: int) -> None:
    many = curve.prefill_tokens_s(np.array([decodes]), most, np.array([spare_s]))
    assert curve.prefill_token_s(decodes, most, spare_s) == pytest.approx(float(many[0]), rel=1e-9, abs=1e-15)


def test_coefficients_without_samples_do_not_drift() -> None:
    curve = before = replace(StepCurve.of(LINE), h=0.003)
    random = np.random.default_rng(0)
    for _ in range(30):
        decodes = random.integers(1, 64, 256).astype(float)
        seconds = (LINE.d + LINE.b * decodes) * np.where(random.random(256) < 0.15, 1.5, 1.0)
        curve = refitted(curve, decodes, 0 * decodes, 0 * decodes, seconds)
    assert (curve.e, curve.h) == pytest.approx((before.e, before.h), rel=0.05)


def test_prefill_cost_of_a_batch_that_fills_the_budget() -> None:
    curve = StepCurve.of(LINE)
    assert curve.prefill_token_s(600, 512) == pytest.approx(curve.prefill_token_s(448, 512))


def test_model_refits_and_resets_the_curve() -> None:
    model = StepTimeModel(times=LINE)
    for decodes, context, prefill, seconds in zip(*steps(320, seed=8), strict=True):
        model.observe(decodes, int(prefill), context / decodes, seconds)
    assert mean_error(model.curve, steps(200, seed=9, noise=0.0)) < 0.04
    model.start_over(LINE)
    assert model.curve.step_s(64, 6400) == StepCurve.of(LINE).step_s(64, 6400)


def test_model_without_forms_fits_the_same_curve() -> None:
    both, alone = StepTimeModel(times=LINE), StepTimeModel(times=LINE, forms=False)
    for decodes, context, prefill, seconds in zip(*steps(64, seed=8), strict=True):
        for model in (both, alone):
            model.observe(decodes, int(prefill), context / decodes, seconds)
    assert (alone.curve.at_knots == both.curve.at_knots).all()
    assert alone.times == LINE != both.times
    assert alone.itl_quality is None
    assert alone.curve_quality == both.curve_quality is not None
