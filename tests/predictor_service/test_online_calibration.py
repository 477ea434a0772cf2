"""Online calibration by model and class, and its state file."""

from __future__ import annotations

import math
import threading

import numpy as np
import pytest

from predictor_service.calibration.online import MAX_MODELS, MAX_WINDOWS, WINDOW, FinishedAnswer, OnlineCalibration
from predictor_service.calibration.state import STATE_FILE, CalibrationState, StateUnusable, fingerprint
from predictor_service.model.length_model import Prediction

TYPICAL = Prediction(100.0, 100.0, 280.0)


def finished(
    seed: int, rows: int, *, scale: float = 1.0, model: str = "m", slo_class: str = "chat", noise: float = 0.8
):
    random = np.random.default_rng(seed)
    p50 = random.uniform(30, 500, rows)
    tokens = np.maximum(scale * p50 * np.exp(random.normal(0, noise, rows)), 1).astype(int)
    return [
        FinishedAnswer(model, slo_class, p, p * math.exp(1.03), int(t), False) for p, t in zip(p50, tokens, strict=True)
    ]


def calibrated(*answers: list[FinishedAnswer]) -> OnlineCalibration:
    calibration = OnlineCalibration()
    for batch in answers:
        calibration.observe(batch)
    calibration.refit()
    return calibration


def coverage(calibration: OnlineCalibration, answers: list[FinishedAnswer]) -> float:
    corrected = [calibration.correct(a.model, a.slo_class, Prediction(a.p50, a.p50, a.p90)) for a in answers]
    return float(np.mean([a.tokens <= c.p90 for a, c in zip(answers, corrected, strict=True)]))


def test_correct_returns_prediction_without_observations():
    assert OnlineCalibration().correct("m", "chat", TYPICAL) == TYPICAL


@pytest.mark.parametrize("scale", [0.2, 3.0])
def test_p90_covers_nine_in_ten_after_200_answers(scale):
    covered = [
        coverage(calibrated(finished(seed, 200, scale=scale)), finished(99, 1000, scale=scale)) for seed in range(10)
    ]
    assert np.mean(covered) == pytest.approx(0.9, abs=0.025)
    assert coverage(OnlineCalibration(), finished(99, 1000, scale=scale)) != pytest.approx(0.9, abs=0.08)


def test_p90_coverage_and_calibration_error_on_stream():
    calibration, covered = OnlineCalibration(), []
    stream = finished(5, 400, scale=0.25)
    for first in range(0, 400, 20):
        covered.append(coverage(calibration, stream[first : first + 20]))
        calibration.observe(stream[first : first + 20])
        calibration.refit()
    assert np.mean(covered[10:]) == pytest.approx(0.9, abs=0.06)
    (error, count), *_ = calibration.calibration_errors().values()
    assert count == 400
    assert error == pytest.approx(np.mean(covered) - 0.9, abs=0.03)


def test_small_class_borrows_from_model_and_large_class_does_not():
    others, few, many = finished(1, 400, slo_class="code"), finished(2, 4, scale=0.1), finished(2, 400, scale=0.1)
    alone = calibrated(many).correct("m", "chat", TYPICAL).p50
    assert calibrated(others, few).correct("m", "chat", TYPICAL).p50 > 3 * alone
    assert calibrated(others, many).correct("m", "chat", TYPICAL).p50 == pytest.approx(alone, rel=0.15)


def test_unknown_class_uses_model_and_unknown_model_uses_all():
    calibration = calibrated(finished(1, 300, scale=0.2), finished(2, 300, scale=0.2, model="other"))
    for model, slo_class in (("m", "never seen"), ("never seen", "chat"), ("", "")):
        assert calibration.correct(model, slo_class, TYPICAL).p50 == pytest.approx(20, rel=0.3)


def test_window_follows_changed_model():
    calibration = calibrated(finished(1, WINDOW), finished(2, WINDOW, scale=0.2))
    assert calibration.correct("m", "chat", TYPICAL).p50 == pytest.approx(20, rel=0.2)


def test_least_recently_observed_models_and_windows_are_dropped():
    calibration = calibrated(finished(1, 100, model="m0", scale=0.1), finished(2, 100, model="m1"))
    assert calibration.correct("m0", "chat", TYPICAL) != calibration.correct("unknown", "chat", TYPICAL)
    for n in range(2, MAX_MODELS + 5):
        calibration.observe(finished(n, 1, model=f"m{n}"))
    models = {model for model, _ in calibration.calibration_errors()}
    assert models == {f"m{n}" for n in range(5, MAX_MODELS + 5)}
    assert calibration.correct("m0", "chat", TYPICAL) == calibration.correct("unknown", "chat", TYPICAL)

    calibration.observe(finished(1, 100, model="m9", slo_class="c0", scale=0.1))
    calibration.observe(finished(2, 100, model="m9", slo_class="chat"))
    calibration.refit()
    assert calibration.correct("m9", "c0", TYPICAL) != calibration.correct("m9", "unknown", TYPICAL)
    for n in range(1, MAX_WINDOWS + 7):
        calibration.observe(finished(n, 1, model="m9", slo_class=f"c{n}"))
    assert len(calibration.calibration_errors()) == MAX_WINDOWS
    assert calibration.correct("m9", "c0", TYPICAL) == calibration.correct("m9", "unknown", TYPICAL)


def test_refit_is_rarer_with_fuller_window():
    calibration, fits = OnlineCalibration(), 0
    for answer in finished(3, 400):
        calibration.observe([answer])
        fits += calibration.refit()
    assert fits < 80


def test_calibration_is_thread_safe():
    calibration, stop, broken = OnlineCalibration(), threading.Event(), []

    def refit() -> None:
        while not stop.is_set():
            try:
                calibration.refit()
            except Exception as error:
                broken.append(error)

    thread = threading.Thread(target=refit)
    thread.start()
    for n in range(30):
        calibration.observe(finished(n, 50, model=f"m{n}"))
        calibration.correct(f"m{n}", "chat", TYPICAL)
    stop.set()
    thread.join()
    assert not broken


def test_state_survives_restart(tmp_path):
    before = calibrated(finished(1, 300, scale=0.2), finished(2, 40, model="other", scale=2.0))
    CalibrationState(tmp_path, "p").save(before)
    after = OnlineCalibration()
    assert CalibrationState(tmp_path, "p").load(after)
    for model in ("m", "other", "never seen"):
        assert after.correct(model, "chat", TYPICAL).p90 == pytest.approx(
            before.correct(model, "chat", TYPICAL).p90, rel=0.02
        )
    assert [path.name for path in tmp_path.iterdir()] == [STATE_FILE]


def test_state_of_other_length_model_is_ignored(tmp_path):
    CalibrationState(tmp_path, "p").save(calibrated(finished(1, 50)))
    assert not CalibrationState(tmp_path, "q").load(OnlineCalibration())


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"[]", b"\xff", b'{"format": 2}', b'{"format": 1, "predictor": "p", "windows": 3}',
     b'{"format": 1, "predictor": "p", "windows": [{"model": "m", "slo_class": "c", "rows": [[1, 2]]}]}',
     b'{"format": 1, "predictor": "p", "windows": [{"model": "m", "slo_class": "c", "rows": [[1, 2, 1e9, 1]]}]}'],
)  # fmt: skip
def test_damaged_state_file_is_ignored(tmp_path, text):
    (tmp_path / STATE_FILE).write_bytes(text)
    calibration = OnlineCalibration()
    assert not CalibrationState(tmp_path, "p").load(calibration)
    assert calibration.correct("m", "c", TYPICAL) == TYPICAL


def test_failed_save_keeps_previous_file(tmp_path, monkeypatch):
    state = CalibrationState(tmp_path, "p")
    state.save(calibrated(finished(1, 50)))
    previous = (tmp_path / STATE_FILE).read_bytes()

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        state.save(calibrated(finished(2, 90)))
    assert (tmp_path / STATE_FILE).read_bytes() == previous
    assert [path.name for path in tmp_path.iterdir()] == [STATE_FILE]


def test_state_rejects_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StateUnusable, match="cannot be written"):
        CalibrationState(tmp_path / "file", "p")


def test_fingerprint_changes_with_model_card(tmp_path):
    (tmp_path / "card.json").write_text("{}")
    first = fingerprint("p", tmp_path)
    (tmp_path / "card.json").write_text('{"seed": 1}')
    assert fingerprint("p", tmp_path) != first
    assert first.startswith("p:")


def test_borrowed_answers_fade_with_own_answers():
    others = finished(1, 400, slo_class="code")
    own = finished(2, 400, scale=0.1)
    alone = calibrated(own).correct("m", "chat", TYPICAL).p50
    bias = [calibrated(others, own[:n]).correct("m", "chat", TYPICAL).p50 / alone - 1 for n in (4, 40, 400)]
    assert bias[0] > 2 * bias[1] > 4 * bias[2] >= 0
