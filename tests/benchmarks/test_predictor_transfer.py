"""The study of the length predictor on a model that it was not trained on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.predictor import transfer as predictor_transfer
from benchmarks.predictor.transfer import DATA_FILE, MAX_TOKENS, evaluate, keep, main, read_kept, simulate
from predictor_service.model.features import prompt_features

SECRET = "xyzzy-private-prompt"


def test_calibration_beats_constant_median_on_other_model() -> None:
    methods = evaluate(seed=0, shuffles=20)["methods"]
    assert methods["calibrated"]["mae_tokens"] < methods["constant"]["mae_tokens"]
    assert methods["calibrated"]["mae_tokens"] < methods["uncalibrated"]["mae_tokens"]
    assert methods["calibrated"]["coverage_p90"] >= 0.88


def test_calibration_follows_transformed_lengths() -> None:
    for name, methods in simulate(seed=1, shuffles=4)["models"].items():
        calibrated, constant = methods["calibrated"], methods["constant"]
        assert (
            calibrated["mae_tokens"] < (1.02 if name == "unrelated to the prompt" else 0.9) * constant["mae_tokens"]
        ), name
        assert calibrated["coverage_p90"] > 0.86, name


def test_data_file_holds_numbers_only() -> None:
    with np.load(DATA_FILE, allow_pickle=False) as kept:
        assert all(kept[name].dtype.kind in "iufb" for name in kept.files)
    features, lengths, censored = read_kept()
    assert len(features) == len(lengths) == len(censored) >= 200
    assert (lengths[censored] == MAX_TOKENS).all()
    assert (np.diff(features[0].indices.astype(int)) > 0).all()


def test_keep_stops_at_first_missing_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [(row, f"{SECRET} number {row}") for row in (7, 4, 3, 9, 5)]
    monkeypatch.setattr(predictor_transfer, "held_out_prompts", lambda seed: prompts)
    answers = tmp_path / "answers.jsonl"
    lines = [{"row": row, "tokens": 10 * row, "censored": row == 3} for row in (5, 3, 7)]
    lines.append({"row": 4, "tokens": 0, "censored": False})  # rejected by the engine, so not missing
    answers.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert keep(answers, tmp_path / "kept.npz") == 2
    features, lengths, censored = read_kept(tmp_path / "kept.npz")
    assert (lengths.tolist(), censored.tolist()) == ([30, 70], [True, False])
    assert features[1].indices.tolist() == prompt_features(f"{SECRET} number 7").indices.tolist()
    assert SECRET.encode() not in (tmp_path / "kept.npz").read_bytes()


def test_read_kept_rejects_other_features_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez_compressed(tmp_path / "old.npz", features_version=np.array(0))
    with pytest.raises(ValueError, match=r"predictor\.transfer keep"):
        read_kept(tmp_path / "old.npz")


def test_command_prints_table_or_json(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predictor_transfer, "simulate", lambda seed, finished: simulate(seed, finished, shuffles=1))
    main(["simulate", "--finished", "100"])
    assert "calibrated" in capsys.readouterr().out
    main(["simulate", "--json", "--seed", "3"])
    assert json.loads(capsys.readouterr().out)["seed"] == 3
