"""Hashes of every word and every character n-gram of a text, by whole-array arithmetic.

Hashes are polynomial in the code points, so that one cumulative sum gives the hash of every span of the text,

    H[i] = sum_{k<i} c_k * P^k  (mod 2^64),      hash(i..j) = (H[j] - H[i]) * P^-i  (mod 2^64).

They are the same in every process: no Python ``hash``, no locale, no state.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MAX_CODES = 2 * (3072 + 1024)
"""Code points of the longest text that is hashed."""

GRAM_SIZES = (3, 4, 5)
GRAM_HEAD_CHARS, GRAM_TAIL_CHARS = 512, 256
"""Character n-grams are taken from these ends only: they cost the most and add the least further in."""

Codes = NDArray[np.uint32]
Hashes = NDArray[np.uint64]
Places = NDArray[np.int64]

_PRIME = 0x9E3779B97F4A7C15


def _powers(base: int) -> Hashes:
    """base^0 .. base^MAX_CODES modulo 2^64."""
    factors = np.full(MAX_CODES + 1, base, dtype=np.uint64)
    factors[0] = 1
    return np.cumprod(factors, dtype=np.uint64)


_POWERS, _INVERSES = _powers(_PRIME), _powers(pow(_PRIME, -1, 1 << 64))
_PAIR = np.uint64(0xD1B54A32D192ED03)
_PLACE = np.array([0x8CB92BA72F3D8DD7, 0xABC98388FB8FAC03, 0xD6E8FEB86659FD93, 0xA0761D6478BD642F], dtype=np.uint64)


@dataclass(slots=True, frozen=True)
class Words:
    """The words of a text: their hashes, and where each begins and ends; all of shape (words,)."""

    hashes: Hashes
    starts: Places
    ends: Places


def code_points(text: str) -> Codes:
    """The text as numbers; lone surrogates and all."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4").astype(np.uint32, copy=False)


def find_words(codes: Codes) -> Words:
    """The words of a lower-case text of at most `MAX_CODES` code points."""
    inside = np.zeros(len(codes) + 2, dtype=np.int8)
    inside[1:-1] = _WORD_CLASS[np.minimum(codes, len(_WORD_CLASS) - 1)]
    edges = np.diff(inside)
    starts, ends = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
    prefix = _prefix(codes)
    return Words((prefix[ends] - prefix[starts]) * _INVERSES[starts], starts, ends)


def word_hashes(words: Words) -> Hashes:
    """Well-mixed hashes of words, of neighbouring pairs, of the first three words by place and of the last."""
    single = words.hashes
    pairs = single[:-1] * _PAIR + single[1:]
    few = min(3, len(single))
    placed = np.concatenate([single[:3], single[-1:]]) ^ np.concatenate([_PLACE[:few], _PLACE[3:]])[: few + min(few, 1)]
    return _mix(np.concatenate([single, pairs, placed]))


def gram_hashes(codes: Codes) -> Hashes:
    """Well-mixed hashes of the character n-grams at the text's two ends."""
    if len(codes) > GRAM_HEAD_CHARS + GRAM_TAIL_CHARS:
        codes = np.concatenate([codes[:GRAM_HEAD_CHARS], codes[-GRAM_TAIL_CHARS:]])
    prefix = _prefix(codes)
    hashes = [
        (prefix[size:] - prefix[:-size]) * _INVERSES[: len(prefix) - size] + np.uint64(size)
        for size in GRAM_SIZES
        if len(codes) >= size
    ]
    return _mix(np.concatenate(hashes)) if hashes else np.zeros(0, dtype=np.uint64)


def _mix(x: Hashes) -> Hashes:
    """SplitMix64's finaliser: every bit of the polynomial reaches the bits that pick the bucket."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _prefix(codes: Codes) -> Hashes:
    prefix = np.zeros(len(codes) + 1, dtype=np.uint64)
    np.cumsum((codes.astype(np.uint64) + np.uint64(1)) * _POWERS[: len(codes)], out=prefix[1:])
    return prefix


def _word_class() -> NDArray[np.int8]:
    """1 for code points that belong to words: ASCII letters and digits, the apostrophe, everything past
    U+00BF."""
    table = np.zeros(0xC1, dtype=np.int8)
    for first, last in ((0x30, 0x39), (0x61, 0x7A), (0x27, 0x27), (0xC0, 0xC0)):
        table[first : last + 1] = 1
    return table


_WORD_CLASS = _word_class()
