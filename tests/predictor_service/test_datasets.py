import json

import numpy as np
import pytest

from predictor_service.model.features import FEATURES_VERSION, LEXICAL_SIZE, prompt_features
from predictor_service.training.checkpoint import CHECKPOINT_FILE, Checkpoint, fingerprint, forget
from predictor_service.training.datasets import BadData, read_dataset, read_jsonl


def collected(prompt: str, length: int) -> dict[str, object]:
    features = prompt_features(prompt)
    arrays = {name: getattr(features, name).tolist() for name in ("indices", "counts", "lexical")}
    named = {"model": "m", "slo_class": "chat"}
    return {"features": arrays, "features_version": FEATURES_VERSION, "length": length, "censored": False} | named


def write(path, lines):
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    return path


def test_prompts_and_lengths_are_read_with_what_is_left_out_filled_in(tmp_path):
    later = {"prompt": "and then?", "length": 7, "censored": True, "conversation": "c", "first": False}
    turns, _ = read_jsonl(write(tmp_path / "a.jsonl", [{"prompt": "hello", "length": 12}, later]))
    assert [(t.prompt, t.length, t.censored, t.first) for t in turns] == [
        ("hello", 12, False, True),
        ("and then?", 7, True, False),
    ]
    assert turns[1].conversation == "c"


def test_collected_features_train_as_their_prompts_would(tmp_path):
    prompts = [f"explain number {n}" for n in range(250)]
    as_text = [{"prompt": prompt, "length": 50 + n} for n, prompt in enumerate(prompts)]
    as_features = [collected(prompt, 50 + n) for n, prompt in enumerate(prompts)]
    text = read_dataset(3, lambda stage, share: None, write(tmp_path / "text.jsonl", as_text))
    features = read_dataset(3, lambda stage, share: None, write(tmp_path / "features.jsonl", as_features))
    assert features.name != text.name
    rows = np.arange(250)
    for one, other in zip(text.examples(rows).features, features.examples(rows).features, strict=True):
        assert (one.indices == other.indices).all()
        assert one.lexical == pytest.approx(other.lexical)
    with pytest.raises(BadData, match="reads text"):
        features.prompts(rows)


def test_the_same_features_stay_on_one_side_of_the_split(tmp_path):
    lines = [collected(f"explain number {n % 150}", 50 + n) for n in range(300)]
    data = read_dataset(0, lambda stage, share: None, write(tmp_path / "a.jsonl", lines))
    seen = {
        name: {data.turns[row].features.indices.tobytes() for row in getattr(data.split, name)}
        for name in ("train", "validation", "test")
    }
    assert not seen["train"] & (seen["validation"] | seen["test"])
    assert not seen["validation"] & seen["test"]


def test_a_folders_files_are_read_in_order(tmp_path):
    write(tmp_path / "b.jsonl", [{"prompt": "second", "length": 2}])
    write(tmp_path / "a.jsonl", [{"prompt": "first", "length": 1}])
    assert [turn.prompt for turn in read_jsonl(tmp_path)[0]] == ["first", "second"]


@pytest.mark.parametrize(
    ("line", "named"),
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
        (collected("x", 3) | {"features_version": 0}, "features_version"),
        (collected("x", 3) | {"features": ["SECRET"]}, "features"),
        (collected("x", 3) | {"features": {"indices": [1.5], "counts": [1]}}, "indices"),
        (collected("x", 3) | {"features": {"indices": [5, 5], "counts": [1, 1]}}, "increasing"),
        (collected("x", 3) | {"features": {"indices": [5, 9 << 20], "counts": [1, 1]}}, "increasing"),
        (collected("x", 3) | {"features": {"indices": [5], "counts": [1, 1]}}, "as many"),
        (collected("x", 3) | {"features": {"indices": [5], "counts": [0], "lexical": [0] * LEXICAL_SIZE}}, "counts"),
        (collected("x", 3) | {"features": {"indices": [5], "counts": [1], "lexical": ["SECRET"]}}, "lexical"),
    ],
)
def test_a_bad_line_is_named_with_its_field_and_never_its_value(tmp_path, line, named):
    text = line if isinstance(line, str) else json.dumps(line)
    (tmp_path / "a.jsonl").write_text('{"prompt": "fine", "length": 3}\n' + text + "\n")
    with pytest.raises(BadData, match=named) as caught:
        read_jsonl(tmp_path / "a.jsonl")
    assert "a.jsonl, line 2" in str(caught.value)
    assert "SECRET" not in str(caught.value)


def test_too_few_answers_or_no_files_are_said(tmp_path):
    with pytest.raises(BadData, match="fewer than"):
        read_dataset(0, lambda stage, share: None, write(tmp_path / "a.jsonl", [{"prompt": "x", "length": 3}]))
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadData, match=r"no \.jsonl file"):
        read_jsonl(tmp_path / "empty")


def test_a_checkpoint_comes_back_only_for_the_run_that_wrote_it(tmp_path):
    key = fingerprint({"seed": 1}, np.arange(3.0))
    mine = Checkpoint(tmp_path, key)
    assert mine.load() is None
    mine.save({"weights": np.arange(4, dtype=np.float32)}, {"steps": 7})
    tensors, state = mine.load()
    assert (tensors["weights"] == np.arange(4)).all()
    assert state == {"steps": 7}
    assert Checkpoint(tmp_path, fingerprint({"seed": 2}, np.arange(3.0))).load() is None
    assert Checkpoint(tmp_path, fingerprint({"seed": 1}, np.arange(4.0))).load() is None
    (tmp_path / CHECKPOINT_FILE).write_bytes(b"half a file")
    assert mine.load() is None
    forget(tmp_path)
    assert not list(tmp_path.iterdir())
