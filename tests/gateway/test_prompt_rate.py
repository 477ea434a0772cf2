"""How many prompt tokens come in a second: right from the start, and forgetting."""

from __future__ import annotations

import math

import numpy as np
import pytest

from gateway.policies.prompt_rate import MEMORY_S, PromptRate


@pytest.mark.parametrize("seconds", [2, 30, 300])
def test_a_steady_stream_is_told_as_it_is_from_the_first_seconds_on(seconds: int) -> None:
    rate = PromptRate()
    for at in np.arange(0.0, seconds, 0.1).tolist():
        rate.note(at, 50.0, at)
    assert rate.per_s(seconds) == pytest.approx(500, rel=0.1)


def test_it_is_boundless_until_time_has_passed_and_forgets() -> None:
    rate = PromptRate()
    assert rate.per_s(5.0) == math.inf
    rate.note(5.0, 1000.0, 5.0)
    assert rate.per_s(5.0) == math.inf
    soon, later = rate.per_s(6.0), rate.per_s(5.0 + 3 * MEMORY_S)
    assert soon == pytest.approx(1000, rel=0.1)
    assert later < 0.06 * soon
    assert rate.newest_s == 5.0


def test_noting_nothing_changes_nothing() -> None:
    rate = PromptRate()
    rate.note(0.0, 100.0, 0.0)
    before = rate.per_s(3.0)
    for at in (1.0, 2.0, 2.0):
        rate.note(at, 0.0, -math.inf)
    assert rate.per_s(3.0) == pytest.approx(before)
