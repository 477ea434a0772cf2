"""What the length model sees of a prompt: hashed n-grams and a few lexical measures, all by whole-array
arithmetic.

The same function runs at training, in the service and in the gateway, so a prompt always becomes the same
numbers. Words (`predictor_service.model.hashed_text`) live in the lower half of the buckets, character n-grams in
the upper half; the measures are those of `predictor_service.model.lexical`.

The wire form (`Features.to_wire`) is what ``POST /v1/predict`` takes as ``features`` in place of ``prompt``:

    {"version": 2, "indices": <base64 of little-endian uint16, strictly increasing>,
     "counts": <base64 of uint8, as many, each at least 1>, "lexical": [LEXICAL_SIZE finite numbers]}

It holds no text. It is not anonymous: whoever guesses a prompt can check the guess.
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from predictor_service.model.hashed_text import MAX_CODES, code_points, find_words, gram_hashes, word_hashes
from predictor_service.model.lexical import LEXICAL_SIZE, lexical_measures

FEATURES_VERSION = 2
"""Names this exact mapping from text to numbers; a model is only served with the version that it was trained
on."""

BUCKETS = 1 << 16
WORD_BUCKETS = 1 << 15
"""Indices below are words and word pairs, at or above are character n-grams."""

HEAD_CHARS, TAIL_CHARS = 3072, 1024
"""A longer prompt is read at its two ends, where instructions stand. Training cuts the same way."""

MAX_COUNT = 255


class MalformedFeatures(ValueError):  # noqa: N818 - it names what is wrong
    """A wire form that is none; the message names the field and never repeats its value."""


@dataclass(slots=True, frozen=True)
class Features:
    """One prompt as numbers.

    ``indices`` (strictly increasing, shape (n,), each below `BUCKETS`), ``counts`` (shape (n,), 1 to
    `MAX_COUNT`) and ``lexical`` (shape (LEXICAL_SIZE,), see `predictor_service.model.lexical.LEXICAL_NAMES`).
    """

    indices: NDArray[np.uint16]
    counts: NDArray[np.uint8]
    lexical: NDArray[np.float32]

    def to_wire(self) -> dict[str, Any]:
        """The JSON-ready, text-free form; `features_from_wire` reads it back."""
        return {
            "version": FEATURES_VERSION,
            "indices": base64.b64encode(self.indices.astype("<u2").tobytes()).decode("ascii"),
            "counts": base64.b64encode(self.counts.tobytes()).decode("ascii"),
            "lexical": [round(float(x), 5) for x in self.lexical],
        }


def prompt_features(prompt: str) -> Features:
    """Turn a prompt into numbers; the same ones in every process. Never fails, whatever the text."""
    long = len(prompt) > HEAD_CHARS + TAIL_CHARS
    kept = prompt[:HEAD_CHARS] + prompt[-TAIL_CHARS:] if long else prompt
    lower = code_points(kept.lower())[:MAX_CODES]
    words = find_words(lower)
    hashed = word_hashes(words)
    buckets = np.concatenate([hashed % np.uint64(WORD_BUCKETS), gram_hashes(lower) % np.uint64(WORD_BUCKETS)])
    buckets[len(hashed) :] += np.uint64(WORD_BUCKETS)
    indices, counts = np.unique(buckets, return_counts=True)
    return Features(
        indices=indices.astype(np.uint16),
        counts=np.minimum(counts, MAX_COUNT).astype(np.uint8),
        lexical=lexical_measures(len(prompt), kept, code_points(kept), words),
    )


def features_from_wire(wire: object) -> Features:
    """Read `Features.to_wire`'s form. Raises `MalformedFeatures` naming the field that is wrong."""
    if not isinstance(wire, dict):
        raise MalformedFeatures("features must be an object")
    if wire.get("version") != FEATURES_VERSION:
        raise MalformedFeatures(f"features.version must be {FEATURES_VERSION}")
    raw_indices, raw_counts = _base64(wire, "indices"), _base64(wire, "counts")
    if len(raw_indices) != 2 * len(raw_counts):
        raise MalformedFeatures("features.indices and features.counts must have as many entries")
    indices = np.frombuffer(raw_indices, dtype="<u2").astype(np.int64)
    return checked_features(indices, np.frombuffer(raw_counts, dtype=np.uint8).astype(np.int64), wire.get("lexical"))


def checked_features(indices: NDArray[np.int64], counts: NDArray[np.int64], lexical: object) -> Features:
    """`Features` of these numbers, from wherever they came. Raises `MalformedFeatures` naming the field that is
    wrong."""
    if len(indices) != len(counts):
        raise MalformedFeatures("features.indices and features.counts must have as many entries")
    if len(indices) and not ((indices[1:] > indices[:-1]).all() and indices[0] >= 0 and indices[-1] < BUCKETS):
        raise MalformedFeatures("features.indices must be strictly increasing")
    if len(counts) and not (counts.min() >= 1 and counts.max() <= MAX_COUNT):
        raise MalformedFeatures(f"features.counts must be at least 1 and at most {MAX_COUNT}")
    if not isinstance(lexical, list) or len(lexical) != LEXICAL_SIZE:
        raise MalformedFeatures(f"features.lexical must be {LEXICAL_SIZE} numbers")
    for value in lexical:
        if isinstance(value, bool) or not isinstance(value, int | float) or not -1e6 <= value <= 1e6:
            raise MalformedFeatures("features.lexical must be finite numbers")
    return Features(indices.astype(np.uint16), counts.astype(np.uint8), np.asarray(lexical, dtype=np.float32))


def _base64(wire: dict[str, Any], field: str) -> bytes:
    value = wire.get(field)
    if not isinstance(value, str):
        raise MalformedFeatures(f"features.{field} must be base64 text")
    try:
        return base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError):
        raise MalformedFeatures(f"features.{field} must be base64 text") from None
