"""Hashes of every word and every character n-gram of a text, by whole-array arithmetic.

Hashes are polynomials in the code points, so that one cumulative sum gives the hash of every span of the text:

    H[i] = sum_{k<i} c_k * P^k  (mod 2^64),      hash(i..j) = (H[j] - H[i]) * P^-i  (mod 2^64).

INVARIANT: hashes are the same in every process. They depend on neither Python's ``hash`` nor the locale.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MAX_CODES = 2 * (3072 + 1024)
"""Code points of the longest text that is hashed: twice the kept characters, because lower case may be longer."""

GRAM_SIZES = (3, 4, 5)
GRAM_HEAD_CHARS, GRAM_TAIL_CHARS = 512, 256
"""Characters at both ends that n-grams are taken from. N-grams cost the most, and those in the middle add little."""

Codes = NDArray[np.uint32]
Hashes = NDArray[np.uint64]
Offsets = NDArray[np.int64]

_PRIME = 0x9E3779B97F4A7C15


def _powers(base: int) -> Hashes:
    """Return base^0 .. base^MAX_CODES modulo 2^64."""
    factors = np.full(MAX_CODES + 1, base, dtype=np.uint64)
    factors[0] = 1
    return np.cumprod(factors, dtype=np.uint64)


_POWERS, _INVERSES = _powers(_PRIME), _powers(pow(_PRIME, -1, 1 << 64))
_PAIR = np.uint64(0xD1B54A32D192ED03)
_POSITION = np.array([0x8CB92BA72F3D8DD7, 0xABC98388FB8FAC03, 0xD6E8FEB86659FD93, 0xA0761D6478BD642F], dtype=np.uint64)


@dataclass(slots=True, frozen=True)
class Words:
    """The words of a text: hash, first code point and one past the last code point; all of shape (words,)."""

    hashes: Hashes
    starts: Offsets
    ends: Offsets


def code_points(text: str) -> Codes:
    """Return the code points of ``text``. Lone surrogates are allowed."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4").astype(np.uint32, copy=False)


def find_words(codes: Codes) -> Words:
    """Return the words of a lower-case text of at most `MAX_CODES` code points."""
    inside = np.zeros(len(codes) + 2, dtype=np.int8)
    inside[1:-1] = _WORD_CLASS[np.minimum(codes, len(_WORD_CLASS) - 1)]
    edges = np.diff(inside)
    starts, ends = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
    prefix = _prefix(codes)
    return Words((prefix[ends] - prefix[starts]) * _INVERSES[starts], starts, ends)


def word_hashes(words: Words) -> Hashes:
    """Return mixed hashes of words, of adjacent pairs, and of the first three words and the last one by position."""
    single = words.hashes
    pairs = single[:-1] * _PAIR + single[1:]
    few = min(3, len(single))
    salts = np.concatenate([_POSITION[:few], _POSITION[3:]])[: few + min(few, 1)]
    positioned = np.concatenate([single[:3], single[-1:]]) ^ salts
    return _mix(np.concatenate([single, pairs, positioned]))


def gram_hashes(codes: Codes) -> Hashes:
    """Return mixed hashes of the character n-grams at the two ends of the text."""
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
    """Apply the finaliser of SplitMix64, so that every bit of the hash affects the bucket."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _prefix(codes: Codes) -> Hashes:
    prefix = np.zeros(len(codes) + 1, dtype=np.uint64)
    np.cumsum((codes.astype(np.uint64) + np.uint64(1)) * _POWERS[: len(codes)], out=prefix[1:])
    return prefix


def _word_class() -> NDArray[np.int8]:
    """Return a table that is 1 for word characters: ASCII letters and digits, apostrophe, all above U+00BF."""
    table = np.zeros(0xC1, dtype=np.int8)
    for first, last in ((0x30, 0x39), (0x61, 0x7A), (0x27, 0x27), (0xC0, 0xC0)):
        table[first : last + 1] = 1
    return table


_WORD_CLASS = _word_class()
