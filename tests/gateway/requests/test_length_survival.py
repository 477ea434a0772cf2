"""The expected length of an answer that is longer than predicted."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.requests.length_survival import surviving_quantile
from gateway.requests.progress import Progress
from gateway.requests.request import Request
from gateway.requests.slo import Slo
from lab.simulate.predictions import SHIPPED

tokens = st.floats(1, 1e6)


def request(p50: float = 100.0, p90: float = 300.0, slo: Slo | None = None, **fields: float) -> Request:
    return Request("r", "chat", 0.0, slo or Slo(None, None, None), 10, p50, p90, **fields)  # type: ignore[arg-type]


@given(tokens, tokens)
def test_quantiles_before_the_first_token_are_the_prediction(p50: float, spread: float) -> None:
    p90 = p50 + spread
    assert surviving_quantile(0.5, 0, p50, p90) == pytest.approx(max(p50, 1.0))
    assert surviving_quantile(0.9, 0, p50, p90) == pytest.approx(max(p90, 1.0), rel=1e-6)


@given(st.floats(0, 1e7), tokens, tokens)
def test_quantiles_exceed_the_generated_tokens_and_are_ordered(generated: float, p50: float, p90: float) -> None:
    median, upper = (surviving_quantile(q, generated, p50, p90) for q in (0.5, 0.9))
    assert generated + 1 <= median <= upper < math.inf


def test_quantiles_equal_those_of_sampled_survivors() -> None:
    drawn = np.random.default_rng(0).lognormal(math.log(100), math.log(3) / 1.2815515655446004, 200_000)
    assert surviving_quantile(0.5, 100, 100, 300) == pytest.approx(np.quantile(drawn, 0.75), rel=0.02)
    survivors = drawn[drawn > 250]
    assert surviving_quantile(0.5, 250, 100, 300) == pytest.approx(np.median(survivors), rel=0.02)
    assert surviving_quantile(0.9, 250, 100, 300) == pytest.approx(np.quantile(survivors, 0.9), rel=0.03)


def test_expected_length_is_the_median_of_held_out_survivors() -> None:
    with np.load(SHIPPED) as held_out:
        length, p50, p90 = (held_out[name].astype(float) for name in ("length", "p50", "p90"))
    longer = length > p50
    expected = np.array([surviving_quantile(0.5, m, m, u) for m, u in zip(p50[longer], p90[longer], strict=True)])
    assert np.mean(length[longer] <= expected) == pytest.approx(0.5, abs=0.08)
    assert np.abs(expected - length[longer]).mean() < 0.9 * np.abs(p50[longer] + 1 - length[longer]).mean()


def test_prediction_is_revised_only_after_the_answer_outlives_it(monkeypatch: pytest.MonkeyPatch) -> None:
    revised_at = []

    def counted(q: float, generated: float, p50: float, p90: float) -> float:
        revised_at.append(generated)
        return surviving_quantile(q, generated, p50, p90)

    monkeypatch.setattr("gateway.requests.request.surviving_quantile", counted)
    running = request()
    for _ in range(99):
        running.advance(1)
    assert (running.predicted_tokens, running.predicted_p90, revised_at) == (100, 300, [])
    running.advance(1)
    assert running.predicted_tokens == pytest.approx(surviving_quantile(0.5, 100, 100, 300))
    assert running.predicted_p90 > 300
    assert running.predicted_at_arrival == 100
    for _ in range(3900):
        running.advance(1)
    assert running.predicted_tokens > 4000
    assert len(revised_at) < 2 * 75


@pytest.mark.parametrize("p90", [8.0, 8.5, 16.0])
def test_revisions_are_few_however_wrong_the_prediction_is(monkeypatch: pytest.MonkeyPatch, p90: float) -> None:
    revised_at = []

    def counted(q: float, generated: float, p50: float, p90: float) -> float:
        revised_at.append(generated)
        return surviving_quantile(q, generated, p50, p90)

    monkeypatch.setattr("gateway.requests.request.surviving_quantile", counted)
    running = request(p50=8, p90=p90)
    for _ in range(4000):
        running.advance(1)
    # 16 ln(4000 / 16) and one for each of the first 16 tokens, two quantiles each time.
    assert len(revised_at) < 2 * 110
    assert running.predicted_tokens > 0.94 * 4000


def test_prediction_of_several_sequences_is_per_sequence() -> None:
    pair = request(sequences=2)
    pair.advance(199)
    assert pair.predicted_tokens == 100
    pair.advance(1)
    assert pair.predicted_tokens == pytest.approx(surviving_quantile(0.5, 100, 100, 300))


def test_max_tokens_bounds_the_revised_prediction() -> None:
    bounded = request(max_tokens=120)
    bounded.advance(110)
    assert (bounded.predicted_tokens, bounded.predicted_p90) == (120, 120)


def test_revised_prediction_keeps_the_implied_pace() -> None:
    paced = request(slo=Slo(None, None, 10.0))
    pace = paced.pace_s
    paced.advance(150)
    assert paced.predicted_tokens > 150
    assert paced.pace_s == pace


def test_progress_advances_the_request() -> None:
    running = request(p50=5, p90=12)
    progress = Progress(running, on_first_token=lambda: None)
    for at in range(6):
        progress.on_tokens("0", 1, float(at))
    assert running.generated == 6
    assert running.predicted_tokens > 6
