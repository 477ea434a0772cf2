"""Training data from live traffic: features and lengths, never text."""

from __future__ import annotations

import json
import stat

import numpy as np
import pytest
from typer.testing import CliRunner

from predictor_service import cli
from predictor_service.model.features import FEATURES_VERSION, prompt_features
from predictor_service.serving.collecting import EXPIRES_S, FILES, MOST_WAITING, Collector, collected, collected_files

SECRET = "xyzzy-private-prompt"
FEATURES = prompt_features(f"Tell me all about {SECRET}, in 200 words")


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def collector(folder, limit_bytes=1 << 20, clock=None):
    return Collector(folder, limit_bytes, clock or Clock())


def test_a_finished_request_becomes_a_line_of_features_and_length(tmp_path):
    kept = collector(tmp_path)
    kept.remember("r1", FEATURES)
    assert kept.finished("r1", "llama", "chat", 321, True)
    assert kept.write() == 1
    (entry,) = collected(tmp_path)
    features = entry.pop("features")
    assert entry == {
        "features_version": FEATURES_VERSION, "length": 321, "censored": True, "model": "llama", "slo_class": "chat",
    }  # fmt: skip
    assert features["indices"] == FEATURES.indices.tolist()
    assert features["counts"] == FEATURES.counts.tolist()
    assert features["lexical"] == pytest.approx(FEATURES.lexical.tolist(), abs=1e-5)
    (file,) = collected_files(tmp_path)
    assert SECRET.encode() not in file.read_bytes()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_a_request_counts_once_and_only_if_it_was_predicted(tmp_path):
    kept = collector(tmp_path)
    kept.remember("r1", FEATURES)
    assert not kept.finished("r2", "m", "c", 3, False)
    assert kept.finished("r1", "m", "c", 3, False)
    assert not kept.finished("r1", "m", "c", 3, False)
    assert kept.write() == 1


def test_what_never_ends_is_forgotten(tmp_path):
    clock = Clock()
    kept = collector(tmp_path, clock=clock)
    kept.remember("old", FEATURES)
    clock.now = EXPIRES_S + 1
    for n in range(MOST_WAITING + 3):
        kept.remember(f"r{n}", FEATURES)
    assert kept.waiting == MOST_WAITING
    assert not kept.finished("old", "m", "c", 1, False)
    assert not kept.finished("r2", "m", "c", 1, False)
    assert kept.finished("r3", "m", "c", 1, False)


def test_the_folder_keeps_to_its_limit_and_the_newest_stay(tmp_path):
    limit = FILES * 20_000
    kept = collector(tmp_path, limit)
    for n in range(400):
        kept.remember("r", FEATURES)
        kept.finished("r", "m", "c", n, False)
        kept.write()
    assert sum(file.stat().st_size for file in collected_files(tmp_path)) <= limit
    lengths = [entry["length"] for entry in collected(tmp_path)]
    assert lengths == list(range(400 - len(lengths), 400))
    assert len(lengths) > 50


def test_a_line_that_a_kill_cut_short_costs_only_itself(tmp_path):
    kept = collector(tmp_path)
    for n in range(2):
        kept.remember("r", FEATURES)
        kept.finished("r", "m", "c", n, False)
    kept.write()
    (file,) = collected_files(tmp_path)
    file.write_bytes(file.read_bytes()[:-100])
    assert [entry["length"] for entry in collected(tmp_path)] == [0]


def test_the_command_exports_one_model_or_all(tmp_path):
    kept = collector(tmp_path / "kept")
    for n, model in enumerate(("a", "b", "a")):
        kept.remember("r", FEATURES)
        kept.finished("r", model, "c", n, n == 2)
    kept.write()
    out = tmp_path / "out.jsonl"
    ran = CliRunner().invoke(cli.app, ["collect", str(tmp_path / "kept"), "--output", str(out), "--json"])
    assert ran.exit_code == 0, ran.output
    assert json.loads(ran.stdout) == {"rows": 3, "censored": 1, "models": {"a": 2, "b": 1}}
    ran = CliRunner().invoke(cli.app, ["collect", str(tmp_path / "kept"), "--output", str(out), "--model", "b"])
    assert ran.exit_code == 0, ran.output
    (only,) = [json.loads(text) for text in out.read_text().splitlines()]
    assert only["model"] == "b"
    assert np.array_equal(only["features"]["indices"], FEATURES.indices)


def test_nothing_collected_is_a_failure_that_says_how_to_begin(tmp_path):
    ran = CliRunner().invoke(cli.app, ["collect", str(tmp_path / "none"), "--output", str(tmp_path / "out")])
    assert ran.exit_code == 1
    assert "--collect" in ran.output
