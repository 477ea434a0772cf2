"""Step jitter: the configured deviation, a mean of 1, and reproducible by seed."""

from __future__ import annotations

import numpy as np
import pytest

from lab.simulate.step_jitter import DRIFT_STEPS, StepJitter


def factors(step_jitter: StepJitter, seed: int = 0, steps: int = 40_000) -> np.ndarray:
    engine = step_jitter.step_factors(seed)
    return np.array([engine.next() for _ in range(steps)])


@pytest.mark.parametrize(("jitter", "drift"), [(0.05, 0.03), (0.2, 0.1)])
def test_factors_have_mean_one_and_given_deviation(jitter: float, drift: float) -> None:
    found = factors(StepJitter(jitter, drift))
    assert found.mean() == pytest.approx(1, abs=0.01)
    assert np.log(found).std() == pytest.approx(np.hypot(jitter, drift), rel=0.05)


def test_drift_is_autocorrelated_and_jitter_is_not() -> None:
    def autocorrelation(step_jitter: StepJitter) -> float:
        logs = np.log(factors(step_jitter))
        return float(np.corrcoef(logs[:-DRIFT_STEPS], logs[DRIFT_STEPS:])[0, 1])

    assert autocorrelation(StepJitter(0.0, 0.1)) == pytest.approx(np.exp(-1), abs=0.1)
    assert autocorrelation(StepJitter(0.1, 0.0)) == pytest.approx(0, abs=0.03)


def test_factors_are_reproducible_by_seed() -> None:
    step_jitter = StepJitter(0.2, 0.1)
    assert np.array_equal(factors(step_jitter, 1, 100), factors(step_jitter, 1, 100))
    assert not np.array_equal(factors(step_jitter, 1, 100), factors(step_jitter, 2, 100))
