"""What finished answers teach, by model and class."""

from __future__ import annotations

import math
import threading

import numpy as np
import pytest

from predictor_service.calibration import online as online_calibration
from predictor_service.calibration.online import MAX_MODELS, MAX_WINDOWS, WINDOW, Finished, OnlineCalibration
from predictor_service.calibration.state import STATE_FILE, CalibrationState, StateUnusable, fingerprint
from predictor_service.model.length_model import Prediction

TYPICAL = Prediction(100.0, 100.0, 280.0)


def finished(
    seed: int, rows: int, *, scale: float = 1.0, model: str = "m", slo_class: str = "chat", noise: float = 0.8
):
    random = np.random.default_rng(seed)
    p50 = random.uniform(30, 500, rows)
    tokens = np.maximum(scale * p50 * np.exp(random.normal(0, noise, rows)), 1).astype(int)
    return [Finished(model, slo_class, p, p * math.exp(1.03), int(t), False) for p, t in zip(p50, tokens, strict=True)]


def learnt(*answers: list[Finished]) -> OnlineCalibration:
    calibration = OnlineCalibration()
    for some in answers:
        calibration.observe(some)
    calibration.refit()
    return calibration


def coverage(calibration: OnlineCalibration, answers: list[Finished]) -> float:
    served = [calibration.correct(a.model, a.slo_class, Prediction(a.p50, a.p50, a.p90)) for a in answers]
    return float(np.mean([a.tokens <= s.p90 for a, s in zip(answers, served, strict=True)]))


def test_nothing_is_corrected_before_anything_has_finished():
    assert OnlineCalibration().correct("m", "chat", TYPICAL) == TYPICAL


@pytest.mark.parametrize("scale", [0.2, 3.0])
def test_p90_covers_nine_in_ten_within_a_few_hundred_answers_of_a_new_model(scale):
    found = [coverage(learnt(finished(seed, 200, scale=scale)), finished(99, 1000, scale=scale)) for seed in range(10)]
    assert np.mean(found) == pytest.approx(0.9, abs=0.025)
    assert coverage(OnlineCalibration(), finished(99, 1000, scale=scale)) != pytest.approx(0.9, abs=0.08)


def test_it_learns_along_the_way_and_not_only_at_the_end():
    calibration, within = OnlineCalibration(), []
    stream = finished(5, 400, scale=0.25)
    for first in range(0, 400, 20):
        within.append(coverage(calibration, stream[first : first + 20]))
        calibration.observe(stream[first : first + 20])
        calibration.refit()
    assert np.mean(within[10:]) == pytest.approx(0.9, abs=0.06)
    (error, count), *_ = calibration.errors().values()
    assert count == 400
    assert error == pytest.approx(np.mean(within) - 0.9, abs=0.03)


def test_a_class_of_few_answers_leans_on_its_model_and_a_class_of_many_does_not():
    others, few, many = finished(1, 400, slo_class="code"), finished(2, 4, scale=0.1), finished(2, 400, scale=0.1)
    alone = learnt(many).correct("m", "chat", TYPICAL).p50
    assert learnt(others, few).correct("m", "chat", TYPICAL).p50 > 3 * alone
    assert learnt(others, many).correct("m", "chat", TYPICAL).p50 == pytest.approx(alone, rel=0.15)


def test_an_unknown_class_gets_its_models_scale_and_an_unknown_model_that_of_all():
    calibration = learnt(finished(1, 300, scale=0.2), finished(2, 300, scale=0.2, model="other"))
    for model, slo_class in (("m", "never seen"), ("never seen", "chat"), ("", "")):
        assert calibration.correct(model, slo_class, TYPICAL).p50 == pytest.approx(20, rel=0.3)


def test_the_window_slides_so_that_a_model_that_changed_is_followed():
    calibration = learnt(finished(1, WINDOW), finished(2, WINDOW, scale=0.2))
    assert calibration.correct("m", "chat", TYPICAL).p50 == pytest.approx(20, rel=0.2)


def test_the_number_of_models_and_windows_is_bounded_and_the_stalest_goes_first():
    calibration = OnlineCalibration()
    for n in range(MAX_MODELS + 5):
        calibration.observe(finished(n, 1, model=f"m{n}"))
    models = {model for model, _ in calibration.errors()}
    assert models == {f"m{n}" for n in range(5, MAX_MODELS + 5)}
    for n in range(MAX_WINDOWS + 7):
        calibration.observe(finished(n, 1, model="m9", slo_class=f"c{n}"))
    assert len(calibration.errors()) == MAX_WINDOWS
    calibration.refit()
    assert len(calibration._corrections) <= MAX_WINDOWS
    assert len(calibration._pools) <= MAX_MODELS + 1


def test_fits_become_rarer_as_a_window_fills():
    calibration, fits = OnlineCalibration(), 0
    for answer in finished(3, 400):
        calibration.observe([answer])
        fits += calibration.refit()
    assert fits < 80


def test_it_may_be_used_from_several_threads():
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


def test_what_was_learnt_survives_a_restart(tmp_path):
    before = learnt(finished(1, 300, scale=0.2), finished(2, 40, model="other", scale=2.0))
    CalibrationState(tmp_path, "p").save(before)
    after = OnlineCalibration()
    assert CalibrationState(tmp_path, "p").load(after)
    for model in ("m", "other", "never seen"):
        assert after.correct(model, "chat", TYPICAL).p90 == pytest.approx(
            before.correct(model, "chat", TYPICAL).p90, rel=0.02
        )
    assert [path.name for path in tmp_path.iterdir()] == [STATE_FILE]


def test_another_length_model_starts_without_the_corrections_of_the_last(tmp_path):
    CalibrationState(tmp_path, "p").save(learnt(finished(1, 50)))
    assert not CalibrationState(tmp_path, "q").load(OnlineCalibration())


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"[]", b"\xff", b'{"format": 2}', b'{"format": 1, "predictor": "p", "windows": 3}',
     b'{"format": 1, "predictor": "p", "windows": [{"model": "m", "slo_class": "c", "rows": [[1, 2]]}]}',
     b'{"format": 1, "predictor": "p", "windows": [{"model": "m", "slo_class": "c", "rows": [[1, 2, 1e9, 1]]}]}'],
)  # fmt: skip
def test_a_damaged_file_means_starting_without(tmp_path, text):
    (tmp_path / STATE_FILE).write_bytes(text)
    calibration = OnlineCalibration()
    assert not CalibrationState(tmp_path, "p").load(calibration)
    assert calibration.correct("m", "c", TYPICAL) == TYPICAL


def test_a_save_that_fails_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    state = CalibrationState(tmp_path, "p")
    state.save(learnt(finished(1, 50)))
    kept = (tmp_path / STATE_FILE).read_bytes()

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        state.save(learnt(finished(2, 90)))
    assert (tmp_path / STATE_FILE).read_bytes() == kept
    assert [path.name for path in tmp_path.iterdir()] == [STATE_FILE]


def test_a_folder_that_cannot_be_written_is_said_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StateUnusable, match="cannot be written"):
        CalibrationState(tmp_path / "file", "p")


def test_a_model_trained_anew_is_another_one(tmp_path):
    (tmp_path / "card.json").write_text("{}")
    first = fingerprint("p", tmp_path)
    (tmp_path / "card.json").write_text('{"seed": 1}')
    assert fingerprint("p", tmp_path) != first
    assert first.startswith("p:")


def test_what_is_borrowed_fades():
    share = online_calibration._share
    assert share(64.0, 0.0, 640) == pytest.approx(0.1)
    assert share(64.0, 1e6, 640) < 1e-4
    assert share(64.0, 0.0, 3) == 1.0
