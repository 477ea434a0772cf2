"""How many prompt tokens come in a second: right from the start, quick to see a surge, slow to forget."""

from __future__ import annotations

import math

import numpy as np
import pytest

from gateway.policies.prompt_rate import PromptRate


def steady(rate: PromptRate, since: float, until: float, per_s: float) -> None:
    for at in np.arange(since, until, 0.05).tolist():
        rate.note(at, per_s * 0.05)


@pytest.mark.parametrize("seconds", [2, 30, 300])
def test_a_steady_stream_is_told_as_it_is_from_the_first_seconds_on(seconds: int) -> None:
    rate = PromptRate()
    steady(rate, 0.0, seconds, 500.0)
    assert rate.per_s(seconds) == pytest.approx(500, rel=0.1)


def test_it_is_boundless_until_time_has_passed() -> None:
    rate = PromptRate()
    assert rate.per_s(5.0) == math.inf
    rate.note(5.0, 1000.0)
    assert rate.per_s(5.0) == math.inf
    assert rate.per_s(5.5) < math.inf


def test_a_surge_after_a_lull_is_seen_within_two_seconds() -> None:
    rate = PromptRate()
    steady(rate, 0.0, 20.0, 500.0)
    assert rate.per_s(80.0) < 5
    steady(rate, 80.0, 82.0, 5000.0)
    assert rate.per_s(82.0) > 4000


def test_a_moment_of_quiet_is_not_taken_for_the_end() -> None:
    rate = PromptRate()
    steady(rate, 0.0, 60.0, 5000.0)
    assert rate.per_s(62.0) > 3500


def test_noting_nothing_changes_nothing() -> None:
    rate = PromptRate()
    rate.note(0.0, 0.0)
    assert rate.per_s(3.0) == math.inf, "nothing has come yet"
    rate.note(0.0, 100.0)
    before = rate.per_s(3.0)
    rate.note(1.0, 0.0)
    assert rate.per_s(3.0) == pytest.approx(before)
