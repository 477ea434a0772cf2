import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from predictor_service.model.features import Features, prompt_features
from predictor_service.model.length_model import (
    CARD_FILE,
    SHIPPED_MODEL,
    WEIGHTS_FILE,
    ModelUnusable,
    Prediction,
    load_model,
)
from predictor_service.training.evaluate import kendall_tau, measure_speed, quality

SHIPPED = load_model()


def held_out() -> tuple[list[Features], np.ndarray, np.ndarray, np.ndarray]:
    """Return features, lengths and censoring of 300 test rows, and reference lengths, from `make_held_out.py`."""
    data = np.load(Path(__file__).with_name("held_out.npz"))
    cuts = np.cumsum(data["stored"])[:-1]
    features = [
        Features(np.cumsum(steps, dtype=np.uint16), counts, lexical)
        for steps, counts, lexical in zip(
            np.split(data["steps"], cuts), np.split(data["counts"], cuts), data["lexical"], strict=True
        )
    ]
    # Three lengths with the median and the maximum of the training part.
    reference = np.array([1.0, data["train_median"], data["train_longest"]])
    return features, data["length"].astype(np.float64), data["censored"], reference


def held_out_metrics() -> dict[str, float]:
    features, length, censored, reference = held_out()
    return quality(SHIPPED.predict(features), length, censored, reference)


def test_shipped_model_is_small_and_has_card():
    size = sum(file.stat().st_size for file in SHIPPED_MODEL.iterdir())
    assert {file.name for file in SHIPPED_MODEL.iterdir()} == {WEIGHTS_FILE, CARD_FILE}
    assert size < 5_000_000
    assert {"dataset", "tokenizer", "seed", "split", "censoring", "length_is", "metrics"} <= SHIPPED.card.keys()


def test_shipped_model_beats_constant_on_held_out_answers():
    metrics = held_out_metrics()
    assert metrics["kendall_tau"] > 0.32
    assert metrics["mae_tokens"] < 0.88 * metrics["mae_constant"]
    assert 0.85 <= metrics["coverage_p90"] <= 0.95


def test_card_matches_held_out_rows_and_meets_targets():
    metrics, card = held_out_metrics(), SHIPPED.card["metrics"]["test"]
    assert metrics["kendall_tau"] == pytest.approx(card["kendall_tau"], abs=0.08)
    assert metrics["mae_tokens"] == pytest.approx(card["mae_tokens"], rel=0.15)
    assert card["kendall_tau"] >= 0.38
    assert card["mae_tokens"] <= 125
    assert 0.88 <= card["coverage_p90"] <= 0.92


def test_measure_speed_accepts_prompts_and_features():
    prompts = ["Explain how a heap works, with an example. " * 10] * 30
    for inputs in (prompts, [prompt_features(prompt) for prompt in prompts]):
        speed = measure_speed(SHIPPED, inputs)
        assert 0 < speed["latency_ms_p50"] <= speed["latency_ms_p99"]
        assert speed["throughput_rps"] > 0


def test_shipped_model_predicts_longer_answer_for_long_request():
    short, long = SHIPPED.predict(
        [prompt_features("hi"), prompt_features("Write a detailed 2000 word blog post about sailing")]
    )
    assert short.length < 0.5 * long.length


@given(st.text(st.characters(), max_size=200))
def test_predictions_are_finite_and_ordered(text):
    (prediction,) = SHIPPED.predict([prompt_features(text)])
    assert np.isfinite([prediction.length, prediction.p50, prediction.p90]).all()
    assert 1.0 <= prediction.p50 <= prediction.p90
    assert prediction.length == prediction.p50


@given(
    st.lists(st.floats(1, 1e5), min_size=3, max_size=3).map(sorted),
    st.none() | st.integers(0, 2000),
    st.none() | st.integers(0, 2000),
)
def test_clamped_prediction_is_within_bounds_and_ordered(values, low, span):
    p50, length, p90 = values
    high = None if span is None else (low or 0) + max(span, 1)
    clamped = Prediction(length, p50, p90).clamped(low, high)
    assert clamped.p50 <= clamped.length <= clamped.p90
    for value in (clamped.length, clamped.p50, clamped.p90):
        assert low is None or value >= low
        assert high is None or value <= high


def test_batch_size_does_not_change_predictions():
    rows = [prompt_features(text) for text in ("hello", "", "def f(x):\n  return x", "Écrivez un poème")]
    assert SHIPPED.predict(rows) == [SHIPPED.predict([row])[0] for row in rows]


def test_load_model_error_says_what_to_do(tmp_path):
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
    (tmp_path / CARD_FILE).write_text(json.dumps(["no card"]))
    with pytest.raises(ModelUnusable, match="names no model"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("tensor", "change"),
    [
        ("weight", lambda x: x[:-1]),
        ("idf", lambda x: x * np.nan),
        ("lexical_mean", lambda x: x[1:]),
        ("tree_below", lambda x: x + 10_000_000),
        ("calibration_tail", lambda x: x[:-1]),
        ("intercept", None),
    ],
)
def test_load_model_rejects_damaged_tensor(tmp_path, tensor, change):
    SHIPPED.save(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS_FILE)
    if change is None:
        del tensors[tensor]
    else:
        tensors[tensor] = np.ascontiguousarray(change(tensors[tensor]))
    save_file(tensors, tmp_path / WEIGHTS_FILE)
    with pytest.raises(ModelUnusable, match="damaged"):
        load_model(tmp_path)


def test_kendall_tau_matches_hand_computed_values():
    assert kendall_tau(np.array([1.0, 2, 3]), np.array([10.0, 20, 30])) == 1.0
    assert kendall_tau(np.array([1.0, 2, 3]), np.array([3.0, 2, 1])) == -1.0
    assert kendall_tau(np.array([1.0, 1, 2, 3]), np.array([1.0, 2, 2, 3])) == pytest.approx(4 / 5)
    assert kendall_tau(np.ones(4), np.arange(4.0)) == 0.0
