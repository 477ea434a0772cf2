"""Steps that vary: by as much as was said, with a mean of one, and alike for the same seed."""

from __future__ import annotations

import numpy as np
import pytest

from lab.simulate.step_jitter import DRIFTS_OVER, StepJitter


def speeds(step_jitter: StepJitter, seed: int = 0, steps: int = 40_000) -> np.ndarray:
    engine = step_jitter.speeds(seed)
    return np.array([engine.next() for _ in range(steps)])


@pytest.mark.parametrize(("jitter", "drift"), [(0.05, 0.03), (0.2, 0.1)])
def test_it_varies_by_what_was_said_about_a_mean_of_one(jitter: float, drift: float) -> None:
    found = speeds(StepJitter(jitter, drift))
    assert found.mean() == pytest.approx(1, abs=0.01)
    assert np.log(found).std() == pytest.approx(np.hypot(jitter, drift), rel=0.05)


def test_a_drift_lasts_and_a_jitter_does_not() -> None:
    def kept(step_jitter: StepJitter) -> float:
        logs = np.log(speeds(step_jitter))
        return float(np.corrcoef(logs[:-DRIFTS_OVER], logs[DRIFTS_OVER:])[0, 1])

    assert kept(StepJitter(0.0, 0.1)) == pytest.approx(np.exp(-1), abs=0.1)
    assert kept(StepJitter(0.1, 0.0)) == pytest.approx(0, abs=0.03)


def test_a_seed_says_it_all() -> None:
    step_jitter = StepJitter(0.2, 0.1)
    assert np.array_equal(speeds(step_jitter, 1, 100), speeds(step_jitter, 1, 100))
    assert not np.array_equal(speeds(step_jitter, 1, 100), speeds(step_jitter, 2, 100))
