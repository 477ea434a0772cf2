"""Collection of training data from live traffic."""

from __future__ import annotations

import json
import stat

import numpy as np
import pytest
from typer.testing import CliRunner

from predictor_service import cli
from predictor_service.model.features import FEATURES_VERSION, prompt_features
from predictor_service.serving.collecting import (
    FILES,
    MAX_PENDING,
    PENDING_TTL_S,
    Collector,
    list_files,
    read_entries,
)

SECRET = "xyzzy-private-prompt"
FEATURES = prompt_features(f"Tell me all about {SECRET}, in 200 words")


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def make_collector(folder, limit_bytes=1 << 20, clock=None):
    return Collector(folder, limit_bytes, clock or Clock())


def test_collector_writes_features_and_length_of_finished_request(tmp_path):
    collector = make_collector(tmp_path)
    collector.record_prediction("r1", FEATURES)
    assert collector.record_finish("r1", "llama", "chat", 321, True)
    assert collector.write() == 1
    (entry,) = read_entries(tmp_path)
    features = entry.pop("features")
    assert entry == {
        "features_version": FEATURES_VERSION, "length": 321, "censored": True, "model": "llama", "slo_class": "chat",
    }  # fmt: skip
    assert features["indices"] == FEATURES.indices.tolist()
    assert features["counts"] == FEATURES.counts.tolist()
    assert features["lexical"] == pytest.approx(FEATURES.lexical.tolist(), abs=1e-5)
    (file,) = list_files(tmp_path)
    assert SECRET.encode() not in file.read_bytes()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_collector_writes_each_predicted_request_once(tmp_path):
    collector = make_collector(tmp_path)
    collector.record_prediction("r1", FEATURES)
    assert not collector.record_finish("r2", "m", "c", 3, False)
    assert collector.record_finish("r1", "m", "c", 3, False)
    assert not collector.record_finish("r1", "m", "c", 3, False)
    assert collector.write() == 1


def test_collector_drops_old_pending_predictions(tmp_path):
    clock = Clock()
    collector = make_collector(tmp_path, clock=clock)
    collector.record_prediction("old", FEATURES)
    clock.now = PENDING_TTL_S + 1
    for n in range(MAX_PENDING + 3):
        collector.record_prediction(f"r{n}", FEATURES)
    assert collector.pending == MAX_PENDING
    assert not collector.record_finish("old", "m", "c", 1, False)
    assert not collector.record_finish("r2", "m", "c", 1, False)
    assert collector.record_finish("r3", "m", "c", 1, False)


def test_collector_keeps_newest_entries_within_limit(tmp_path):
    limit = FILES * 20_000
    collector = make_collector(tmp_path, limit)
    for n in range(400):
        collector.record_prediction("r", FEATURES)
        collector.record_finish("r", "m", "c", n, False)
        collector.write()
    assert sum(file.stat().st_size for file in list_files(tmp_path)) <= limit
    lengths = [entry["length"] for entry in read_entries(tmp_path)]
    assert lengths == list(range(400 - len(lengths), 400))
    assert len(lengths) > 50


def test_read_entries_skips_incomplete_line(tmp_path):
    collector = make_collector(tmp_path)
    for n in range(2):
        collector.record_prediction("r", FEATURES)
        collector.record_finish("r", "m", "c", n, False)
    collector.write()
    (file,) = list_files(tmp_path)
    file.write_bytes(file.read_bytes()[:-100])
    assert [entry["length"] for entry in read_entries(tmp_path)] == [0]


def test_collect_command_exports_one_model_or_all(tmp_path):
    collector = make_collector(tmp_path / "kept")
    for n, model in enumerate(("a", "b", "a")):
        collector.record_prediction("r", FEATURES)
        collector.record_finish("r", model, "c", n, n == 2)
    collector.write()
    out = tmp_path / "out.jsonl"
    ran = CliRunner().invoke(cli.app, ["collect", str(tmp_path / "kept"), "--output", str(out), "--json"])
    assert ran.exit_code == 0, ran.output
    assert json.loads(ran.stdout) == {"rows": 3, "censored": 1, "models": {"a": 2, "b": 1}}
    ran = CliRunner().invoke(cli.app, ["collect", str(tmp_path / "kept"), "--output", str(out), "--model", "b"])
    assert ran.exit_code == 0, ran.output
    (only,) = [json.loads(text) for text in out.read_text().splitlines()]
    assert only["model"] == "b"
    assert np.array_equal(only["features"]["indices"], FEATURES.indices)


def test_collect_command_fails_without_folder(tmp_path):
    ran = CliRunner().invoke(cli.app, ["collect", str(tmp_path / "none"), "--output", str(tmp_path / "out")])
    assert ran.exit_code == 1
    assert "--collect" in ran.output
