"""What the length model sees of a prompt: hashed n-grams and a few lexical measures, all by whole-array
arithmetic.

The same function runs at training, in the service and in the gateway, so a prompt always becomes the same
numbers: no Python ``hash``, no locale, no state. Hashes are polynomial in the code points, so that one
cumulative sum gives the hash of every span of the text,

    H[i] = sum_{k<i} c_k * P^k  (mod 2^64),      hash(i..j) = (H[j] - H[i]) * P^-i  (mod 2^64),

then mixed and cut to a bucket. Words live in the lower half of the buckets, character n-grams in the upper
half.

The wire form (`Features.to_wire`) is what ``POST /v1/predict`` takes as ``features`` in place of ``prompt``:

    {"version": 1, "indices": <base64 of little-endian uint16, strictly increasing>,
     "counts": <base64 of uint8, as many, each at least 1>, "lexical": [LEXICAL_SIZE finite numbers]}

It holds no text. It is not anonymous: whoever guesses a prompt can check the guess.
"""

from __future__ import annotations

import base64
import binascii
import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

FEATURES_VERSION = 1
"""Names this exact mapping from text to numbers; a model is only served with the version that it was trained
on."""

BUCKETS = 1 << 16
WORD_BUCKETS = 1 << 15
"""Indices below are words and word pairs, at or above are character n-grams."""

HEAD_CHARS, TAIL_CHARS = 3072, 1024
"""A longer prompt is read at its two ends, where instructions stand. Training cuts the same way."""

GRAM_HEAD_CHARS, GRAM_TAIL_CHARS = 512, 256
"""Character n-grams are taken from these ends only: they cost the most and add the least further in."""

GRAM_SIZES = (3, 4, 5)
MAX_COUNT = 255

Codes = NDArray[np.uint32]
Hashes = NDArray[np.uint64]

_MAX_CODES = 2 * (HEAD_CHARS + TAIL_CHARS)
_PRIME = 0x9E3779B97F4A7C15


def _powers(base: int) -> Hashes:
    """base^0 .. base^_MAX_CODES modulo 2^64."""
    factors = np.full(_MAX_CODES + 1, base, dtype=np.uint64)
    factors[0] = 1
    return np.cumprod(factors, dtype=np.uint64)


_POWERS, _INVERSES = _powers(_PRIME), _powers(pow(_PRIME, -1, 1 << 64))
_PAIR = np.uint64(0xD1B54A32D192ED03)
_PLACE = np.array([0x8CB92BA72F3D8DD7, 0xABC98388FB8FAC03, 0xD6E8FEB86659FD93, 0xA0761D6478BD642F], dtype=np.uint64)


class MalformedFeatures(ValueError):  # noqa: N818 - it names what is wrong
    """A wire form that is none; the message names the field and never repeats its value."""


@dataclass(slots=True, frozen=True)
class Features:
    """One prompt as numbers.

    ``indices`` (strictly increasing, shape (n,), each below `BUCKETS`), ``counts`` (shape (n,), 1 to
    `MAX_COUNT`) and ``lexical`` (shape (LEXICAL_SIZE,), see `LEXICAL_NAMES`).
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
    cased = _codes(kept)
    codes = _codes(kept.lower())[:_MAX_CODES]
    words, starts = _word_hashes(codes)
    buckets = np.concatenate([words % np.uint64(WORD_BUCKETS), _gram_hashes(codes) % np.uint64(WORD_BUCKETS)])
    buckets[len(words) :] += np.uint64(WORD_BUCKETS)
    indices, counts = np.unique(buckets, return_counts=True)
    return Features(
        indices=indices.astype(np.uint16),
        counts=np.minimum(counts, MAX_COUNT).astype(np.uint8),
        lexical=_lexical(len(prompt), kept, cased, starts),
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
    indices = np.frombuffer(raw_indices, dtype="<u2").astype(np.uint16)
    counts = np.frombuffer(raw_counts, dtype=np.uint8)
    if len(indices) > 1 and not (indices[1:] > indices[:-1]).all():
        raise MalformedFeatures("features.indices must be strictly increasing")
    if not counts.all():
        raise MalformedFeatures("features.counts must be at least 1")
    lexical = wire.get("lexical")
    if not isinstance(lexical, list) or len(lexical) != LEXICAL_SIZE:
        raise MalformedFeatures(f"features.lexical must be {LEXICAL_SIZE} numbers")
    for value in lexical:
        if isinstance(value, bool) or not isinstance(value, int | float) or not -1e6 <= value <= 1e6:
            raise MalformedFeatures("features.lexical must be finite numbers")
    return Features(indices=indices, counts=counts, lexical=np.asarray(lexical, dtype=np.float32))


def _base64(wire: dict[str, Any], field: str) -> bytes:
    value = wire.get(field)
    if not isinstance(value, str):
        raise MalformedFeatures(f"features.{field} must be base64 text")
    try:
        return base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError):
        raise MalformedFeatures(f"features.{field} must be base64 text") from None


def _codes(text: str) -> Codes:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4").astype(np.uint32, copy=False)


def _mix(x: Hashes) -> Hashes:
    """SplitMix64's finaliser: every bit of the polynomial reaches the bits that pick the bucket."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _prefix(codes: Codes) -> Hashes:
    prefix = np.zeros(len(codes) + 1, dtype=np.uint64)
    np.cumsum((codes.astype(np.uint64) + np.uint64(1)) * _POWERS[: len(codes)], out=prefix[1:])
    return prefix


def _word_hashes(codes: Codes) -> tuple[Hashes, NDArray[np.int64]]:
    """Hashes of words, of neighbouring pairs, of the first three words by place and of the last; word
    starts."""
    inside = np.zeros(len(codes) + 2, dtype=np.int8)
    inside[1:-1] = _WORD_CLASS[np.minimum(codes, len(_WORD_CLASS) - 1)]
    edges = np.diff(inside)
    starts, ends = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
    prefix = _prefix(codes)
    words = (prefix[ends] - prefix[starts]) * _INVERSES[starts]
    pairs = words[:-1] * _PAIR + words[1:]
    placed = (
        np.concatenate([words[:3], words[-1:]])
        ^ np.concatenate([_PLACE[: min(3, len(words))], _PLACE[3:]])[: min(3, len(words)) + min(1, len(words))]
    )
    return _mix(np.concatenate([words, pairs, placed])), starts


def _gram_hashes(codes: Codes) -> Hashes:
    if len(codes) > GRAM_HEAD_CHARS + GRAM_TAIL_CHARS:
        codes = np.concatenate([codes[:GRAM_HEAD_CHARS], codes[-GRAM_TAIL_CHARS:]])
    prefix = _prefix(codes)
    hashes = [
        (prefix[size:] - prefix[:-size]) * _INVERSES[: len(prefix) - size] + np.uint64(size)
        for size in GRAM_SIZES
        if len(codes) >= size
    ]
    return _mix(np.concatenate(hashes)) if hashes else np.zeros(0, dtype=np.uint64)


def _word_class() -> NDArray[np.int8]:
    """1 for code points that belong to words: ASCII letters and digits, the apostrophe, everything past
    U+00BF."""
    table = np.zeros(0xC1, dtype=np.int8)
    for first, last in ((0x30, 0x39), (0x61, 0x7A), (0x27, 0x27), (0xC0, 0xC0)):
        table[first : last + 1] = 1
    return table


_WORD_CLASS = _word_class()

_ASKED_WORDS = re.compile(r"(\d{1,5})[ -]?(?:\+ ?)?(?:words?|characters?|chars?)\b", re.IGNORECASE)
_ASKED_ITEMS = re.compile(
    r"\b(\d{1,3})\s+(?:\w+\s+)?(?:items?|ideas?|examples?|questions?|tips?|ways?|points?|sentences?|paragraphs?|steps?|"
    r"names?|titles?|reasons?|topics?|lines?|bullet|options?|tweets?|posts?)\b",
    re.IGNORECASE,
)
_LIST_LINE = re.compile(r"^\s*(?:[-*•]|\d+[.)])\s", re.MULTILINE)

_LENGTH_BINS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)

LEXICAL_NAMES = (
    "log_chars",
    "log_words",
    "log_lines",
    "mean_word_chars",
    "upper_share",
    "digit_share",
    "punctuation_share",
    "space_share",
    "non_ascii_share",
    "cjk_share",
    "cyrillic_arabic_share",
    "log_question_marks",
    "ends_with_question_mark",
    "ends_with_colon",
    "ends_with_full_stop",
    "starts_upper",
    "log_code_marks",
    "has_code_fence",
    "has_url",
    "log_list_lines",
    "asks_word_count",
    "log_asked_words",
    "asks_item_count",
    "log_asked_items",
    "has_newline",
    *(f"chars_over_{bound}" for bound in _LENGTH_BINS),
)
LEXICAL_SIZE = len(LEXICAL_NAMES)


def _asked(pattern: re.Pattern[str], text: str) -> tuple[float, float]:
    found = pattern.search(text)
    return (1.0, math.log1p(int(found.group(1)))) if found else (0.0, 0.0)


def _lexical(full_chars: int, kept: str, cased: Codes, starts: NDArray[np.int64]) -> NDArray[np.float32]:
    chars = max(len(cased), 1)
    histogram = np.bincount(np.minimum(cased, 128), minlength=129)
    wide = cased[cased >= 128] if histogram[128] else cased[:0]
    cjk = int(((wide >= 0x2E80) & (wide <= 0xD7FF)).sum())
    eastern = int(((wide >= 0x0400) & (wide <= 0x06FF)).sum())
    space = int(histogram[9:14].sum() + histogram[32])
    upper, digits = int(histogram[65:91].sum()), int(histogram[48:58].sum())
    letters = upper + int(histogram[97:123].sum())
    ascii_rest = int(histogram[:128].sum()) - letters - digits - space
    stripped = kept.strip()
    words, lines = len(starts), int(histogram[10])
    asks_words, asked_words = _asked(_ASKED_WORDS, kept)
    asks_items, asked_items = _asked(_ASKED_ITEMS, kept)
    code_marks = int(sum(histogram[ord(mark)] for mark in "{}[]();=<>_"))
    return np.array(
        [
            math.log1p(full_chars),
            math.log1p(words),
            math.log1p(lines),
            min((chars - space) / max(words, 1), 30.0),
            upper / chars,
            digits / chars,
            ascii_rest / chars,
            space / chars,
            len(wide) / chars,
            cjk / chars,
            eastern / chars,
            math.log1p(int(histogram[63])),
            float(stripped.endswith("?")),
            float(stripped.endswith(":")),
            float(stripped.endswith(".")),
            float(stripped[:1].isupper()),
            math.log1p(code_marks),
            float("```" in kept),
            float("http" in kept),
            math.log1p(len(_LIST_LINE.findall(kept))) if lines else 0.0,
            asks_words,
            asked_words,
            asks_items,
            asked_items,
            float(lines > 0),
            *(float(full_chars > bound) for bound in _LENGTH_BINS),
        ],
        dtype=np.float32,
    )
