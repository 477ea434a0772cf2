import json

import numpy as np
import pytest

from predictor_service.model.features import LEXICAL_SIZE, prompt_features
from predictor_service.training.checkpoint import CHECKPOINT_FILE, Checkpoint, fingerprint, remove_checkpoint
from predictor_service.training.datasets import BadData, read_dataset, read_jsonl
from tests.fixtures.length_data import collected_line, write_jsonl


def line(prompt: str, length: int) -> dict[str, object]:
    return collected_line(prompt_features(prompt), length)


def test_read_jsonl_fills_in_defaults(tmp_path):
    later = {"prompt": "and then?", "length": 7, "censored": True, "conversation": "c", "first": False}
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "hello", "length": 12}, later])
    path.write_text(path.read_text() + "\n")  # blank lines are ignored
    turns, _ = read_jsonl(path)
    assert [(t.prompt, t.length, t.censored, t.first) for t in turns] == [
        ("hello", 12, False, True),
        ("and then?", 7, True, False),
    ]
    assert turns[1].conversation == "c"


def test_collected_features_equal_features_of_prompts(tmp_path):
    prompts = [f"explain number {n}" for n in range(250)]
    as_text = [{"prompt": prompt, "length": 50 + n} for n, prompt in enumerate(prompts)]
    as_features = [line(prompt, 50 + n) for n, prompt in enumerate(prompts)]
    text = read_dataset(3, lambda stage, share: None, write_jsonl(tmp_path / "text.jsonl", as_text))
    features = read_dataset(3, lambda stage, share: None, write_jsonl(tmp_path / "features.jsonl", as_features))
    assert features.name != text.name
    rows = np.arange(250)
    for expected, actual in zip(text.examples(rows).features, features.examples(rows).features, strict=True):
        assert (expected.indices == actual.indices).all()
        assert expected.lexical == pytest.approx(actual.lexical)
    with pytest.raises(BadData, match="reads text"):
        features.prompts(rows)


def test_split_keeps_equal_features_together(tmp_path):
    lines = [line(f"explain number {n % 150}", 50 + n) for n in range(300)]
    data = read_dataset(0, lambda stage, share: None, write_jsonl(tmp_path / "a.jsonl", lines))
    seen = {
        name: {data.turns[row].features.indices.tobytes() for row in getattr(data.split, name)}
        for name in ("train", "validation", "test")
    }
    assert not seen["train"] & (seen["validation"] | seen["test"])
    assert not seen["validation"] & seen["test"]


def test_read_jsonl_reads_files_of_folder_in_order(tmp_path):
    write_jsonl(tmp_path / "b.jsonl", [{"prompt": "second", "length": 2}])
    write_jsonl(tmp_path / "a.jsonl", [{"prompt": "first", "length": 1}])
    assert [turn.prompt for turn in read_jsonl(tmp_path)[0]] == ["first", "second"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "JSON"),
        ("[1]", "object"),
        ({"prompt": "SECRET"}, "length"),
        ({"prompt": "SECRET", "length": 0}, "length"),
        ({"prompt": "SECRET", "length": True}, "length"),
        ({"prompt": ["SECRET"], "length": 3}, "prompt"),
        ({"length": 3}, "prompt"),
        ({"prompt": "x", "length": 3, "censored": "SECRET"}, "censored"),
        ({"prompt": "x", "length": 3, "first": 1}, "first"),
        ({"prompt": "x", "length": 3, "conversation": 5}, "conversation"),
        (line("x", 3) | {"features_version": 0}, "features_version"),
        (line("x", 3) | {"features": ["SECRET"]}, "features"),
        (line("x", 3) | {"features": {"indices": [1.5], "counts": [1]}}, "indices"),
        (line("x", 3) | {"features": {"indices": [5, 5], "counts": [1, 1]}}, "increasing"),
        (line("x", 3) | {"features": {"indices": [5, 9 << 20], "counts": [1, 1]}}, "increasing"),
        (line("x", 3) | {"features": {"indices": [5], "counts": [1, 1]}}, "same length"),
        (line("x", 3) | {"features": {"indices": [5], "counts": [0], "lexical": [0] * LEXICAL_SIZE}}, "counts"),
        (line("x", 3) | {"features": {"indices": [5], "counts": [1], "lexical": ["SECRET"]}}, "lexical"),
    ],
)
def test_read_jsonl_error_names_field_without_value(tmp_path, content, message):
    text = content if isinstance(content, str) else json.dumps(content)
    (tmp_path / "a.jsonl").write_text('{"prompt": "fine", "length": 3}\n' + text + "\n")
    with pytest.raises(BadData, match=message) as caught:
        read_jsonl(tmp_path / "a.jsonl")
    assert "a.jsonl, line 2" in str(caught.value)
    assert "SECRET" not in str(caught.value)


def test_read_dataset_rejects_small_or_empty_data(tmp_path):
    with pytest.raises(BadData, match="fewer than"):
        read_dataset(0, lambda stage, share: None, write_jsonl(tmp_path / "a.jsonl", [{"prompt": "x", "length": 3}]))
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadData, match=r"no \.jsonl file"):
        read_jsonl(tmp_path / "empty")


def test_checkpoint_loads_only_for_run_that_wrote_it(tmp_path):
    key = fingerprint({"seed": 1}, np.arange(3.0))
    checkpoint = Checkpoint(tmp_path, key)
    assert checkpoint.load() is None
    checkpoint.save({"weights": np.arange(4, dtype=np.float32)}, {"steps": 7})
    tensors, state = checkpoint.load()
    assert (tensors["weights"] == np.arange(4)).all()
    assert state == {"steps": 7}
    assert Checkpoint(tmp_path, fingerprint({"seed": 2}, np.arange(3.0))).load() is None
    assert Checkpoint(tmp_path, fingerprint({"seed": 1}, np.arange(4.0))).load() is None
    (tmp_path / CHECKPOINT_FILE).write_bytes(b"half a file")
    assert checkpoint.load() is None
    remove_checkpoint(tmp_path)
    assert not list(tmp_path.iterdir())
