"""Turns a prompt into numbers: hashed n-grams and lexical measures.

Training, the service and the gateway call the same function, so that a prompt always has the same features. Words
(`predictor_service.model.hashed_text`) use the lower half of the buckets, character n-grams the upper half. The
measures come from `predictor_service.model.lexical`.

``POST /v1/predict`` accepts the wire form (`Features.to_wire`) as ``features`` in place of ``prompt``:

    {"version": 2, "indices": <base64 of little-endian uint16, strictly increasing>,
     "counts": <base64 of uint8, one for each index, at least 1>, "lexical": [LEXICAL_SIZE finite numbers]}

NOTE: the wire form holds no text, but it is not anonymous: a reader who guesses a prompt can verify the guess.
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
"""Version of this mapping from text to numbers. A model is served only with the version that it was trained on."""

BUCKETS = 1 << 16
WORD_BUCKETS = 1 << 15
"""First bucket of the character n-grams. Lower buckets hold words and word pairs."""

HEAD_CHARS, TAIL_CHARS = 3072, 1024
"""Characters kept of a longer prompt, at its start and its end, because instructions are there."""

MAX_COUNT = 255
"""Highest count of one bucket: the wire form stores a byte."""


class MalformedFeatures(ValueError):  # noqa: N818
    """Malformed features. The message names the field and never quotes its value."""


@dataclass(slots=True, frozen=True)
class Features:
    """One prompt as numbers.

    ``indices``: buckets that occur, strictly increasing, shape (n,), each below `BUCKETS`.
    ``counts``: how often each occurs, shape (n,), 1 to `MAX_COUNT`.
    ``lexical``: shape (LEXICAL_SIZE,), in the order of `predictor_service.model.lexical.LEXICAL_NAMES`.
    """

    indices: NDArray[np.uint16]
    counts: NDArray[np.uint8]
    lexical: NDArray[np.float32]

    def to_wire(self) -> dict[str, Any]:
        """Return the wire form, ready for JSON; `features_from_wire` reads it."""
        return {
            "version": FEATURES_VERSION,
            "indices": base64.b64encode(self.indices.astype("<u2").tobytes()).decode("ascii"),
            "counts": base64.b64encode(self.counts.tobytes()).decode("ascii"),
            "lexical": [round(float(x), 5) for x in self.lexical],
        }


def prompt_features(prompt: str) -> Features:
    """Return the features of ``prompt``, the same in every process. Accepts any string."""
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
    """Return the features of a wire form (`Features.to_wire`).

    Raises:
        MalformedFeatures: a field is wrong.
    """
    if not isinstance(wire, dict):
        raise MalformedFeatures("features must be an object")
    if wire.get("version") != FEATURES_VERSION:
        raise MalformedFeatures(f"features.version must be {FEATURES_VERSION}")
    raw_indices, raw_counts = _base64(wire, "indices"), _base64(wire, "counts")
    if len(raw_indices) != 2 * len(raw_counts):
        raise MalformedFeatures("features.indices and features.counts must have the same length")
    indices = np.frombuffer(raw_indices, dtype="<u2").astype(np.int64)
    return checked_features(indices, np.frombuffer(raw_counts, dtype=np.uint8).astype(np.int64), wire.get("lexical"))


def checked_features(indices: NDArray[np.int64], counts: NDArray[np.int64], lexical: object) -> Features:
    """Return `Features` of these numbers after checking them.

    Raises:
        MalformedFeatures: a field is wrong.
    """
    if len(indices) != len(counts):
        raise MalformedFeatures("features.indices and features.counts must have the same length")
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
