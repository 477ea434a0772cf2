import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from predictor_service.evaluate import kendall_tau, quality, speed
from predictor_service.features import Features, prompt_features
from predictor_service.length_model import (
    CARD_FILE,
    SHIPPED_MODEL,
    WEIGHTS_FILE,
    ModelUnusable,
    Prediction,
    load_model,
)
from predictor_service.train import Examples

SHIPPED = load_model()


def held_out() -> tuple[Examples, float]:
    """300 of the shipped model's test rows (hashed features and lengths; `make_held_out.py` wrote them)."""
    data = np.load(Path(__file__).with_name("held_out.npz"))
    cuts = np.cumsum(data["stored"])[:-1]
    features = [
        Features(np.cumsum(steps, dtype=np.uint16), counts, lexical)
        for steps, counts, lexical in zip(
            np.split(data["steps"], cuts), np.split(data["counts"], cuts), data["lexical"], strict=True
        )
    ]
    length = data["length"].astype(np.float64)
    return Examples(features, length, data["censored"], np.ones(len(length), bool)), float(data["train_median"])


def test_the_shipped_model_is_small_plain_data_with_a_card():
    size = sum(file.stat().st_size for file in SHIPPED_MODEL.iterdir())
    assert {file.name for file in SHIPPED_MODEL.iterdir()} == {WEIGHTS_FILE, CARD_FILE}
    assert size < 1_000_000
    assert {"dataset", "tokenizer", "seed", "split", "censoring", "length_is", "metrics"} <= SHIPPED.card.keys()


def test_the_shipped_model_beats_a_constant_on_answers_it_has_not_seen():
    test, train_median = held_out()
    metrics = quality(SHIPPED, test, reference=np.array([train_median]))
    assert metrics["kendall_tau"] > 0.30
    assert metrics["mae_tokens"] < 0.90 * metrics["mae_constant"]
    assert 0.85 <= metrics["coverage_p90"] <= 0.95


def test_the_card_tells_what_the_held_out_rows_show():
    test, train_median = held_out()
    metrics, told = quality(SHIPPED, test, np.array([train_median])), SHIPPED.card["metrics"]["test"]
    assert metrics["kendall_tau"] == pytest.approx(told["kendall_tau"], abs=0.08)
    assert metrics["mae_tokens"] == pytest.approx(told["mae_tokens"], rel=0.15)


def test_a_prediction_takes_well_under_two_milliseconds():
    assert speed(SHIPPED, ["Explain how a heap works, with an example. " * 10] * 100)["latency_ms_p50"] < 2.0


def test_ranking_is_sensible():
    short, long = SHIPPED.predict(
        [prompt_features("hi"), prompt_features("Write a detailed 2000 word blog post about sailing")]
    )
    assert short.length < 0.5 * long.length


@given(st.text(st.characters(), max_size=200))
def test_every_prediction_is_finite_and_ordered(text):
    (prediction,) = SHIPPED.predict([prompt_features(text)])
    assert np.isfinite([prediction.length, prediction.p50, prediction.p90]).all()
    assert 1.0 <= prediction.p50 <= prediction.p90
    assert prediction.length == prediction.p50


@given(st.floats(-1e6, 1e6))
def test_the_calibration_curve_is_ordered_at_every_score(score):
    (prediction,) = SHIPPED.quantiles(np.array([score]))
    assert 1.0 <= prediction.p50 <= prediction.p90 < 1e5


@given(
    st.lists(st.floats(1, 1e5), min_size=3, max_size=3).map(sorted),
    st.none() | st.integers(0, 2000),
    st.none() | st.integers(0, 2000),
)
def test_clamps_hold_for_all_three_and_keep_their_order(values, low, span):
    p50, length, p90 = values
    high = None if span is None else (low or 0) + max(span, 1)
    clamped = Prediction(length, p50, p90).clamped(low, high)
    assert clamped.p50 <= clamped.length <= clamped.p90
    for value in (clamped.length, clamped.p50, clamped.p90):
        assert low is None or value >= low
        assert high is None or value <= high


def test_batching_does_not_change_a_prediction():
    rows = [prompt_features(text) for text in ("hello", "", "def f(x):\n  return x", "Écrivez un poème")]
    assert SHIPPED.predict(rows) == [SHIPPED.predict([row])[0] for row in rows]


def test_a_missing_damaged_or_foreign_model_says_what_to_do(tmp_path):
    with pytest.raises(ModelUnusable, match="predictor train"):
        load_model(tmp_path)
    SHIPPED.save(tmp_path)
    assert load_model(tmp_path).predict([prompt_features("x")]) == SHIPPED.predict([prompt_features("x")])

    (tmp_path / CARD_FILE).write_text(json.dumps(SHIPPED.card | {"features_version": 99}))
    with pytest.raises(ModelUnusable, match="another version"):
        load_model(tmp_path)
    (tmp_path / CARD_FILE).write_text(json.dumps(SHIPPED.card))
    (tmp_path / WEIGHTS_FILE).write_bytes((SHIPPED_MODEL / WEIGHTS_FILE).read_bytes()[:1000])
    with pytest.raises(ModelUnusable, match="cannot be read"):
        load_model(tmp_path)


def test_kendall_tau_counts_pairs_and_corrects_for_ties():
    assert kendall_tau(np.array([1.0, 2, 3]), np.array([10.0, 20, 30])) == 1.0
    assert kendall_tau(np.array([1.0, 2, 3]), np.array([3.0, 2, 1])) == -1.0
    assert kendall_tau(np.array([1.0, 1, 2, 3]), np.array([1.0, 2, 2, 3])) == pytest.approx(4 / 5)
    assert kendall_tau(np.ones(4), np.arange(4.0)) == 0.0
