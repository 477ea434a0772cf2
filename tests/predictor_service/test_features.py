import base64
import os
import subprocess
import sys

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from predictor_service.model.features import (
    BUCKETS,
    FEATURES_VERSION,
    HEAD_CHARS,
    TAIL_CHARS,
    WORD_BUCKETS,
    MalformedFeatures,
    features_from_wire,
    prompt_features,
)
from predictor_service.model.lexical import KEYWORDS, LEXICAL_NAMES, LEXICAL_SIZE

PINNED_INDICES = [1470, 1735, 4173, 4386, 10057, 11314]
PINNED_SUM = 4414059
PINNED_COUNT = 103

any_text = st.text(st.characters(), max_size=400)


@pytest.mark.process
def test_features_are_equal_in_every_process():
    script = (
        "import sys, orjson; from predictor_service.model.features import prompt_features; "
        "sys.stdout.buffer.write(orjson.dumps(prompt_features('List 5 ideas\\nfor naïve 猫 cafés?').to_wire()))"
    )
    # This process and the other one have different hash seeds.
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    environment = os.environ | {"PYTHONHASHSEED": seed, "LC_ALL": "C"}
    other = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, check=True)
    assert other.stdout == orjson.dumps(prompt_features("List 5 ideas\nfor naïve 猫 cafés?").to_wire())


def test_features_of_this_version_are_pinned():
    """NOTE: stored models depend on these numbers. A change needs a new FEATURES_VERSION and a new shipped model."""
    features = prompt_features("Write a 500 word essay on tides.")
    assert features.indices[:6].tolist() == PINNED_INDICES
    assert int(features.indices.astype(np.int64).sum()) == PINNED_SUM
    assert len(features.indices) == PINNED_COUNT


@given(any_text)
def test_features_of_any_text_are_well_formed(text):
    features = prompt_features(text)
    assert (np.diff(features.indices.astype(np.int64)) > 0).all()
    assert (features.counts >= 1).all()
    assert features.lexical.shape == (LEXICAL_SIZE,)
    assert np.isfinite(features.lexical).all()


@given(any_text)
def test_wire_form_round_trip(text):
    features = prompt_features(text)
    read = features_from_wire(orjson.loads(orjson.dumps(features.to_wire())))
    assert (read.indices == features.indices).all()
    assert (read.counts == features.counts).all()
    assert np.allclose(read.lexical, features.lexical, atol=1e-4)


@pytest.mark.parametrize("text", ["", " ", "\ud800", "\x00", "İ" * 5000, "a" * 200_000, "🦀" * 9000])
def test_features_of_unusual_prompts_are_finite(text):
    assert np.isfinite(prompt_features(text).lexical).all()


def test_word_hash_does_not_depend_on_position():
    alone, later = prompt_features("tides"), prompt_features("so many quiet evenings of tides here")
    words = {int(i) for i in alone.indices if i < WORD_BUCKETS}
    assert words & {int(i) for i in later.indices}


def test_features_read_two_ends_of_long_prompt():
    head, tail = "h" * HEAD_CHARS, "t" * TAIL_CHARS
    a, b = (prompt_features(head + middle * 50_000 + tail) for middle in "xy")
    assert (a.indices == b.indices).all()
    assert (a.lexical == b.lexical).all()


def measures(prompt: str) -> dict[str, float]:
    return dict(zip(LEXICAL_NAMES, prompt_features(prompt).lexical.tolist(), strict=True))


def test_lexical_measures_read_amounts_with_units():
    found = measures("Write a 500-word essay in 3 short paragraphs and 10 blog post ideas. Then 800 words more.")
    amounts = {name: round(np.expm1(x)) for name, x in found.items() if name.startswith("log_requested_") and x}
    assert amounts == {"log_requested_words": 500, "log_requested_paragraphs": 3, "log_requested_items": 10}
    assert not any(x for name, x in measures("in 1984 the 3rd").items() if name.startswith("log_requested_"))


def test_lexical_measures_count_and_locate_keywords():
    found = measures("Explain this: " + "filler " * 60 + " and summarize, then summarize")
    assert found["log_explain"] == pytest.approx(np.log(2))
    assert found["log_brief"] == pytest.approx(np.log(3))
    assert (found["head_explain"], found["tail_explain"], found["head_brief"], found["tail_brief"]) == (1, 0, 0, 1)


def test_every_keyword_has_one_kind():
    words = [word for kind in KEYWORDS.values() for word in kind.split()]
    assert len(words) == len(set(words))


@pytest.mark.parametrize(
    ("text", "script"),
    [("naïve", "latin"), ("привет", "cyrillic"), ("مرحبا", "arabic"), ("नमस्ते", "indic"), ("かな", "kana"),
     ("猫", "han"), ("안녕", "hangul")],
)  # fmt: skip
def test_lexical_measures_distinguish_scripts(text, script):
    shares = {name.removesuffix("_share"): x for name, x in measures(text).items() if name.endswith("_share")}
    scripts = ("latin", "cyrillic", "arabic", "indic", "kana", "han", "hangul")
    assert [name for name in scripts if shares[name] > 0] == [script]


def test_lexical_measures_describe_lines():
    found = measures("first\n\n  indented line here\nlast")
    exact = {name: round(np.expm1(found[name])) for name in found if name.startswith("log_") and "line" in name}
    assert exact == {
        "log_lines": 3, "log_list_lines": 0, "log_indented_lines": 1, "log_empty_lines": 1, "log_first_line": 5,
        "log_last_line": 4, "log_longest_line": 20,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 0}, "version"),
        ({"indices": "SECRET"}, "indices"),
        ({"indices": 3}, "indices"),
        ({"indices": base64.b64encode(np.array([5, 5], "<u2").tobytes()).decode()}, "increasing"),
        ({"counts": base64.b64encode(b"\x01").decode()}, "same length"),
        ({"counts": base64.b64encode(b"\x00\x01").decode()}, "counts"),
        ({"lexical": [0.0]}, "lexical"),
        ({"lexical": ["SECRET"] * LEXICAL_SIZE}, "lexical"),
        ({"lexical": [True] * LEXICAL_SIZE}, "lexical"),
        ({"lexical": [1e300] * LEXICAL_SIZE}, "lexical"),
    ],
)
def test_malformed_wire_form_error_names_field_without_value(change, message):
    wire = {
        "version": FEATURES_VERSION,
        "indices": base64.b64encode(np.array([5, BUCKETS - 1], "<u2").tobytes()).decode(),
        "counts": base64.b64encode(b"\x01\x02").decode(),
        "lexical": [0.0] * LEXICAL_SIZE,
    }
    features_from_wire(wire)
    with pytest.raises(MalformedFeatures, match=message) as caught:
        features_from_wire(wire | change)
    assert "SECRET" not in str(caught.value)
