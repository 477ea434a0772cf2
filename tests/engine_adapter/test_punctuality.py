"""What is learnt from answers that were late: by how much to be ahead of their bounds."""

from __future__ import annotations

import random

import pytest

from engine_adapter.punctuality import LATE, LEAST, Punctuality


def test_nothing_is_given_up_while_nobody_is_late() -> None:
    learnt = Punctuality()
    for tpot in (0.0, 0.01, 0.05):
        learnt.note(tpot, 0.05)
    assert learnt.share == 1.0


def test_what_was_late_by_more_than_could_be_made_up_for_tells_nothing() -> None:
    learnt = Punctuality()
    learnt.note(0.05 / LEAST + 1e-6, 0.05)
    assert learnt.share == 1.0
    learnt.note(0.05 / LEAST - 1e-6, 0.05)
    assert learnt.share < 1.0


def test_the_share_stays_between_its_least_and_one_and_comes_back() -> None:
    learnt = Punctuality()
    for _ in range(1000):
        learnt.note(0.051, 0.05)
    assert learnt.share == LEAST
    for _ in range(10_000):
        learnt.note(0.04, 0.05)
    assert learnt.share == 1.0


@pytest.mark.parametrize("spread", [0.01, 0.03])
def test_a_hundredth_is_late_in_the_long_run_whatever_they_vary_by(spread: float) -> None:
    learnt, rng, late = Punctuality(), random.Random(1), 0
    for turn in range(20_000):
        tpot = learnt.share * 0.05 * (1 + spread * rng.gauss(0, 1))
        late += turn >= 5_000 and tpot > 0.05
        learnt.note(tpot, 0.05)
    assert late / 15_000 == pytest.approx(LATE, abs=0.003)
