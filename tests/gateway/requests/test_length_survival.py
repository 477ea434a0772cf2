"""What is expected of an answer that has outlived its prediction."""

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
def test_before_the_first_token_it_is_what_was_predicted(p50: float, spread: float) -> None:
    p90 = p50 + spread
    assert surviving_quantile(0.5, 0, p50, p90) == pytest.approx(max(p50, 1.0))
    assert surviving_quantile(0.9, 0, p50, p90) == pytest.approx(max(p90, 1.0), rel=1e-6)


@given(st.floats(0, 1e7), tokens, tokens)
def test_an_answer_is_always_expected_to_go_on_and_p90_beyond_the_median(g: float, p50: float, p90: float) -> None:
    median, upper = (surviving_quantile(q, g, p50, p90) for q in (0.5, 0.9))
    assert g + 1 <= median <= upper < math.inf


def test_at_its_p50_an_answer_becomes_as_long_as_three_quarters_of_all_do() -> None:
    drawn = np.random.default_rng(0).lognormal(math.log(100), math.log(3) / 1.2815515655446004, 200_000)
    assert surviving_quantile(0.5, 100, 100, 300) == pytest.approx(np.quantile(drawn, 0.75), rel=0.02)
    survivors = drawn[drawn > 250]
    assert surviving_quantile(0.5, 250, 100, 300) == pytest.approx(np.median(survivors), rel=0.02)
    assert surviving_quantile(0.9, 250, 100, 300) == pytest.approx(np.quantile(survivors, 0.9), rel=0.03)


def test_held_out_answers_that_outlive_their_p50_end_about_where_it_says() -> None:
    with np.load(SHIPPED) as held_out:
        length, p50, p90 = (held_out[name].astype(float) for name in ("length", "p50", "p90"))
    past = length > p50
    expected = np.array([surviving_quantile(0.5, m, m, u) for m, u in zip(p50[past], p90[past], strict=True)])
    assert np.mean(length[past] <= expected) == pytest.approx(0.5, abs=0.08)
    assert np.abs(expected - length[past]).mean() < 0.9 * np.abs(p50[past] + 1 - length[past]).mean()


def test_a_request_is_looked_at_again_only_once_it_has_outlived_its_prediction(monkeypatch: pytest.MonkeyPatch) -> None:
    looked = []

    def counted(q: float, generated: float, p50: float, p90: float) -> float:
        looked.append(generated)
        return surviving_quantile(q, generated, p50, p90)

    monkeypatch.setattr("gateway.requests.request.surviving_quantile", counted)
    running = request()
    for _ in range(99):
        running.advance(1)
    assert (running.predicted_tokens, running.predicted_p90, looked) == (100, 300, [])
    running.advance(1)
    assert running.predicted_tokens == pytest.approx(surviving_quantile(0.5, 100, 100, 300))
    assert running.predicted_p90 > 300
    assert running.predicted_at_arrival == 100
    for _ in range(3900):
        running.advance(1)
    assert running.predicted_tokens > 4000
    assert len(looked) < 2 * 75


def test_several_sequences_are_expected_each_as_long() -> None:
    pair = request(sequences=2)
    pair.advance(199)
    assert pair.predicted_tokens == 100
    pair.advance(1)
    assert pair.predicted_tokens == pytest.approx(surviving_quantile(0.5, 100, 100, 300))


def test_the_requests_own_limit_bounds_what_is_expected() -> None:
    bounded = request(max_tokens=120)
    bounded.advance(110)
    assert (bounded.predicted_tokens, bounded.predicted_p90) == (120, 120)


def test_the_pace_that_an_end_to_end_bound_implies_stays_as_the_engine_was_told() -> None:
    paced = request(slo=Slo(None, None, 10.0))
    pace = paced.tpot_slo_s
    paced.advance(150)
    assert paced.predicted_tokens > 150
    assert paced.tpot_slo_s == pace


def test_the_engines_tokens_are_what_it_follows() -> None:
    running = request(p50=5, p90=12)
    progress = Progress(running, on_first_token=lambda: None)
    for at in range(6):
        progress.on_tokens("0", 1, float(at))
    assert running.generated == 6
    assert running.predicted_tokens > 6
