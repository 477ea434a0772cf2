"""The curve of step times: it learns leaps that no line has, and is asked for chunks and for what prefill costs."""

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


def steps(count: int, seed: int, least: int = 1, most: int = 220, noise: float = 0.05) -> Steps:
    """Decodes, contexts, prompt tokens and seconds; half of the steps prefill, as a full engine's do."""
    random = np.random.default_rng(seed)
    decodes = random.integers(least, most, count).astype(float)
    context = decodes * random.uniform(200, 600, count)
    prefill = np.where(random.random(count) < 0.5, random.integers(1, 600, count), 0).astype(float)
    true = [A100.step_seconds(int(d), c, int(p), 0) for d, c, p in zip(decodes, context, prefill, strict=True)]
    return decodes, context, prefill, np.array(true) * random.normal(1, noise, count)


def errors(curve: StepCurve, of: Steps) -> float:
    told = np.array([curve.step_s(d, c, p) for d, c, p in zip(*of[:3], strict=True)])
    return float(np.mean(np.abs(told / of[3] - 1)))


def test_it_begins_as_the_two_forms() -> None:
    times = StepTimes(a=1e-7, b=1e-4, d=0.01, alpha=3e-4, beta=0.012)
    curve = StepCurve.of(times)
    assert curve.step_s(20, 20 * 300) == pytest.approx(times.itl(20, 300))
    assert curve.step_s(0, 0, 500) == pytest.approx(times.prefill(500)), "a prompt alone"
    assert curve.step_s(20, 6000, 500) == pytest.approx(times.itl(20, 300) + times.prefill(500) - times.d)
    assert curve.step_s(0, 0, 0) == 0
    several = curve.steps_s(np.array([1.0, 20.0]), np.array([300.0, 6000.0]))
    assert several == pytest.approx([times.itl(1, 300), times.itl(20, 300)])


def test_it_learns_the_leaps_of_an_a100_within_a_few_hundred_steps() -> None:
    unseen = steps(400, seed=9, noise=0.0)
    curve = StepCurve.of(LINE)
    line = errors(curve, unseen)
    curve = refitted(curve, *steps(600, seed=1))
    assert errors(curve, unseen) < 0.03
    assert errors(curve, unseen) < line / 3


def test_hiccups_teach_it_nothing() -> None:
    decodes, context, prefill, seconds = steps(600, seed=2, noise=0.02)
    seconds[::15] *= 20
    assert errors(refitted(StepCurve.of(LINE), decodes, context, prefill, seconds), steps(300, 3, noise=0.0)) < 0.04


def test_on_a_slower_machine_what_it_has_not_seen_again_is_slower_too() -> None:
    known = refitted(StepCurve.of(LINE), *steps(600, seed=4))
    decodes, context, prefill, seconds = steps(100, seed=5, least=100, most=140)
    slower = refitted(known, decodes, context, prefill, 2 * seconds)
    few = steps(300, seed=6, most=60, noise=0.0)
    assert errors(slower, (*few[:3], 2 * few[3])) < 0.1


def test_more_tokens_never_take_less() -> None:
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
def test_a_chunk_leaves_something_of_the_time_there_is(
    curve: StepCurve, decodes: int, within_s: float, pace_s: float, backlog: int
) -> None:
    chunk = curve.chunk(decodes, 400.0 * decodes, within_s, pace_s, backlog)
    assert 0 <= chunk <= backlog
    alone = curve.step_s(decodes, 400.0 * decodes)
    if chunk:
        assert curve.step_s(decodes, 400.0 * decodes, chunk) <= alone + SPENT * (within_s - alone) + 1e-9


@settings(max_examples=200)
@given(CURVES, st.integers(0, 300), st.floats(0, 0.5), st.integers(1, 4000))
def test_where_slack_is_plenty_a_step_takes_the_pace_at_least_however_dear_prompts_are_believed(
    curve: StepCurve, decodes: int, pace_s: float, backlog: int
) -> None:
    context = 400.0 * decodes
    chunk = curve.chunk(decodes, context, 1e6, pace_s, backlog)
    # Whole tokens: the last is cut off.
    assert chunk == backlog or curve.step_s(decodes, context, chunk + 1) >= pace_s - 1e-9


def test_tokens_that_are_free_are_not_all_that_slack_is_spent_on() -> None:
    # 16 are free until the next wave begins, from there on they cost 0.2 ms each.
    curve = StepCurve(0.01 + 2e-4 * np.maximum(KNOTS - 32, 0), a=0.0, e=0.0, h=0.0)
    assert curve.chunk(16, 0, within_s=0.05, pace_s=0.02, backlog=1000) == 16 + int(SPENT * 200)
    assert curve.chunk(16, 0, within_s=0.010001, pace_s=0.02, backlog=1000) == 16, "they go even when no time is left"


@given(CURVES, st.integers(0, 300), st.integers(128, 2000))
def test_large_chunks_are_no_cheaper_than_the_hull_says(curve: StepCurve, decodes: int, prefill: int) -> None:
    knot = float(KNOTS[decodes >= KNOTS][-1])
    cheapest = curve.prefill_token_s(knot, 2048)
    assert cheapest > 0
    if knot + prefill <= 2048:
        extra = curve.step_s(knot, 0, prefill) - (curve.step_s(knot, 0) if knot else 0.0)
        least = 0.25 * curve.step_s(0, 0, 2048) / 2048
        assert cheapest <= max(extra / prefill, least) + 1e-12


@pytest.mark.parametrize(("a_decode", "a_token"), [(5e-4, 3e-5), (5e-5, 5e-5), (2e-5, 2e-4)])
def test_noise_makes_no_prompt_free(a_decode: float, a_token: float) -> None:
    for seed in range(10):
        random = np.random.default_rng(seed)
        curve = StepCurve.of(StepTimes())
        for _ in range(3):
            decodes = random.integers(1, 64, 512).astype(float)
            prefill = np.where(random.random(512) < 0.5, random.integers(128, 2000, 512), 0).astype(float)
            seconds = (0.008 + a_decode * decodes + a_token * prefill) * random.normal(1, 0.05, 512)
            curve = refitted(curve, decodes, 300 * decodes, prefill, seconds)
        told = curve.prefill_tokens_s(np.array([1.0, 8.0, 32.0, 64.0]), 2048)
        assert (told > 0.25 * a_token).all()
        assert (told < 2 * (a_token + 0.008 / 2048)).all()
        costs = [cost for _, cost in curve._costs(32, 2000)]
        assert costs == sorted(costs)


def test_beyond_what_a_step_usually_holds_both_ways_to_ask_agree() -> None:
    curve = StepCurve.of(LINE)
    several = curve.steps_s(np.array([0.0, 10.0]), np.array([0.0, 3000.0]), np.array([20_000.0, 16_384.0]))
    assert several == pytest.approx([curve.step_s(0, 0, 20_000), curve.step_s(10, 3000, 16_384)])
    assert curve.prefill_token_s(8.0, 32_768) == pytest.approx(LINE.alpha, rel=0.05)


def test_a_spare_second_is_not_filled_with_chunks_that_are_all_but_free() -> None:
    # Up to 128 tokens a step takes 10 ms; each one beyond 50 us more.
    curve = replace(StepCurve.of(LINE), at_knots=0.01 + 5e-5 * np.maximum(KNOTS - 128, 0.0), a=0.0, e=0.0, h=0.0)
    small, large = curve.prefill_token_s(16.0, 2048), curve.prefill_token_s(16.0, 2048, 0.03)
    assert small == pytest.approx(0.25 * curve.step_s(0, 0, 2048) / 2048), "next to nothing, and never less than this"
    # 30 ms hold 112 tokens for nothing, and 600.
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
def test_one_batch_is_told_what_many_are(curve: StepCurve, decodes: float, spare_s: float, most: int) -> None:
    many = curve.prefill_tokens_s(np.array([decodes]), most, np.array([spare_s]))
    assert curve.prefill_token_s(decodes, most, spare_s) == pytest.approx(float(many[0]), rel=1e-9, abs=1e-15)


def test_what_no_step_tells_of_does_not_drift() -> None:
    curve = before = replace(StepCurve.of(LINE), h=0.003)
    random = np.random.default_rng(0)
    for _ in range(30):
        decodes = random.integers(1, 64, 256).astype(float)
        seconds = (LINE.d + LINE.b * decodes) * np.where(random.random(256) < 0.15, 1.5, 1.0)
        curve = refitted(curve, decodes, 0 * decodes, 0 * decodes, seconds)
    assert (curve.e, curve.h) == pytest.approx((before.e, before.h), rel=0.05)


def test_a_batch_that_fills_a_step_prefills_as_the_fullest_that_leaves_room() -> None:
    curve = StepCurve.of(LINE)
    assert curve.prefill_token_s(600, 512) == pytest.approx(curve.prefill_token_s(448, 512))


def test_the_model_keeps_the_curve_up_to_date_and_starts_over_with_it() -> None:
    model = StepTimeModel(times=LINE)
    for decodes, context, prefill, seconds in zip(*steps(320, seed=8), strict=True):
        model.observe(decodes, int(prefill), context / decodes, seconds)
    assert errors(model.curve, steps(200, seed=9, noise=0.0)) < 0.04
    model.start_over(LINE)
    assert model.curve.step_s(64, 6400) == StepCurve.of(LINE).step_s(64, 6400)


def test_a_model_that_is_asked_for_the_curve_alone_has_the_same_one_and_leaves_the_forms() -> None:
    both, alone = StepTimeModel(times=LINE), StepTimeModel(times=LINE, forms=False)
    for decodes, context, prefill, seconds in zip(*steps(64, seed=8), strict=True):
        for model in (both, alone):
            model.observe(decodes, int(prefill), context / decodes, seconds)
    assert (alone.curve.at_knots == both.curve.at_knots).all()
    assert alone.times == LINE != both.times
    assert alone.itl_quality is None
    assert alone.curve_quality == both.curve_quality is not None
