from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine_adapter.step_time.linear_forms import nonnegative_least_squares
from engine_adapter.step_time.profile import Profile, Regime
from engine_adapter.step_time.profile_fit import Steps, fit_regimes, nonnegative, quality, split


def profile_of(*regimes: Regime) -> Profile:
    return Profile("a", "", {}, regimes, 256, 2048, 8192, 400_000)


# Flat while memory-bound, then a jump from one wave of tiles to two, then compute-bound.
ATTENTION = (0.0, 2e-6, 8e-8, 0.0, 3e-9, 2e-4, 4e-4)
WAVES = profile_of(
    Regime(64, 0.012, 0, *ATTENTION),
    Regime(128, 0.012 + 64 * -1e-5, 1e-5, *ATTENTION),
    Regime(160, 0.01264 - 128 * 2e-4, 2e-4, *ATTENTION),
    Regime(math.inf, 0.01904 - 160 * 5.5e-5, 5.5e-5, *ATTENTION),
)


def random_steps(truth: Profile, count: int, noise: float, seed: int) -> Steps:
    random = np.random.default_rng(seed)
    rows = []
    for index in range(3 * count):
        decodes = round(math.exp(random.uniform(0, math.log(256)))) if index % 3 != 0 else 0
        prefill = round(math.exp(random.uniform(math.log(8), math.log(1700)))) if index % 3 != 1 else 0
        context, before = decodes * random.uniform(30, 1500), random.choice([0, 0, 700])
        row = (decodes, context, prefill, before if prefill else 0, int(prefill > 0))
        rows.append((*row, truth.step_seconds(*row) * random.lognormal(0, noise)))
    return Steps.of(rows)


def test_fit_predicts_noisy_wave_quantised_steps() -> None:
    fitted = profile_of(*fit_regimes(random_steps(WAVES, 400, noise=0.05, seed=1)))
    for kind, fit in quality(fitted, random_steps(WAVES, 300, noise=0, seed=2)).items():
        assert fit["mape"] < 0.015, kind
        assert fit["r2"] > 0.995, kind


def test_fit_recovers_one_line_without_a_knot() -> None:
    truth = Regime(math.inf, 0.01, 5e-5, 0, 3e-6, 1e-7, 2e-7, 3e-9, 0, 1e-3)
    (fitted,) = fit_regimes(random_steps(profile_of(truth), 200, noise=0, seed=3))
    for name in ("per_decode_context", "per_prefill_context", "per_prefill_pair"):
        assert getattr(fitted, name) == pytest.approx(getattr(truth, name), rel=1e-3)
    assert fitted.per_token + fitted.per_decode == pytest.approx(5.3e-5, rel=1e-3)
    assert fitted.base + fitted.per_prefill_step == pytest.approx(0.011, rel=1e-3)


@settings(max_examples=15)
@given(st.integers(0, 2**32 - 1))
def test_fit_never_makes_more_work_faster(seed: int) -> None:
    random = np.random.default_rng(seed)
    clean = random_steps(WAVES, 30, noise=0, seed=seed)
    fitted = profile_of(*fit_regimes(Steps.of([(*row, random.uniform(0.001, 0.1)) for row in rows_of(clean)])))
    seconds = [fitted.step_seconds(4, 400, p, 0) for p in range(1, 2000, 7)]
    assert (np.diff(seconds) >= -1e-12).all()
    assert fitted.step_seconds(4, 400, 9, 0) <= fitted.step_seconds(4, 500, 9, 10)


def rows_of(steps: Steps) -> list[tuple[float, ...]]:
    return [tuple(getattr(steps, name)[i] for name in Steps.__slots__[:-1]) for i in range(len(steps))]


def test_fit_weights_rare_prefills_like_frequent_decodes() -> None:
    steps = random_steps(WAVES, 700, noise=0.02, seed=4)
    rare_prefills = np.flatnonzero((steps.prefill_tokens == 0) | (np.arange(len(steps)) < 180))
    fitted = profile_of(*fit_regimes(steps.where(rare_prefills)))
    assert quality(fitted, random_steps(WAVES, 300, noise=0, seed=5))["prefill"]["mape"] < 0.03


def test_fit_rejects_too_few_or_impossible_steps() -> None:
    steps = random_steps(WAVES, 10, noise=0, seed=6)
    with pytest.raises(ValueError, match="19 steps are too few"):
        fit_regimes(steps.where(np.arange(19)))
    steps.seconds[3] = 0.0
    with pytest.raises(ValueError, match="more than 0 seconds"):
        fit_regimes(steps)


def test_split_depends_on_seed_and_keeps_every_step() -> None:
    steps = random_steps(WAVES, 40, noise=0.1, seed=7)
    fitted, held_out = split(steps, 0.25, seed=1)
    assert (len(fitted), len(held_out)) == (90, 30)
    assert sorted([*fitted.seconds, *held_out.seconds]) == sorted(steps.seconds)
    assert (split(steps, 0.25, seed=1)[1].seconds == held_out.seconds).all()
    assert (split(steps, 0.25, seed=2)[1].seconds != held_out.seconds).any()


def test_quality_is_computed_per_kind_of_step() -> None:
    steps = random_steps(WAVES, 50, noise=0, seed=8)
    fits = quality(WAVES, steps)
    assert {kind: fit["samples"] for kind, fit in fits.items()} == {"prefill": 50, "itl": 50, "mixed": 50}
    assert all(fit["r2"] == 1 and fit["mape"] == 0 for fit in fits.values())


@given(st.integers(0, 2**32 - 1), st.integers(1, 4))
def test_active_sets_match_exhaustive_search(seed: int, k: int) -> None:
    random = np.random.default_rng(seed)
    columns, target = random.normal(size=(30, k)), random.normal(size=30)
    expected = nonnegative_least_squares(columns, target, parsimonious=False)
    found = nonnegative(columns, target)
    assert (found >= 0).all()
    # A negligible coefficient may be left out, so compare the losses and not the coefficients.
    losses = [float(((columns @ w - target) ** 2).sum()) for w in (found, expected)]
    assert losses[0] <= losses[1] * (1 + 1e-9)


@given(st.integers(0, 2**32 - 1))
def test_active_sets_satisfy_the_kkt_conditions(seed: int) -> None:
    random = np.random.default_rng(seed)
    columns, target = random.uniform(0, 1, size=(60, 20)), random.normal(1, 1, size=60)
    w = nonnegative(columns, target)
    gradient = columns.T @ (target - columns @ w)
    assert (w >= 0).all()
    assert (gradient <= 1e-6).all()
    assert np.abs(gradient[w > 0]).max(initial=0.0) <= 1e-6
