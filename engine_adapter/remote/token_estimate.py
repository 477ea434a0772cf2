"""Estimates how many tokens an output text has, for servers that report no usage."""

from __future__ import annotations

import re
from collections.abc import Iterable

_EAST_ASIAN = r"\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
# One ideograph, syllable or kana; up to three digits, eight ASCII letters, four other letters or four symbols.
_LONGEST_WORD = 8
_PIECE = re.compile(
    rf"[{_EAST_ASIAN}]|\d{{1,3}}|[A-Za-z_]{{1,{_LONGEST_WORD}}}|[^\W\x00-\x7f{_EAST_ASIAN}]{{1,4}}|[^\w\s]{{1,4}}"
)

_SAMPLE_CHARS = 4096
"""Characters of a text that are looked at. The estimate is scaled to the whole text. Bounds the time."""


def estimated_tokens(text: str) -> int:
    """Estimated number of tokens in ``text``; at least 1."""
    word = text[1:] if text.startswith(" ") else text
    if len(word) <= _LONGEST_WORD and word.isalpha() and word.isascii():
        return 1  # Most events of a stream, without the search.
    pieces = len(_PIECE.findall(text, 0, _SAMPLE_CHARS))
    if len(text) > _SAMPLE_CHARS:
        pieces = round(pieces * len(text) / _SAMPLE_CHARS)
    return pieces or 1


def tokens_of_events(texts: Iterable[bytes]) -> int:
    """The sum of `estimated_tokens` of the texts of events (UTF-8)."""
    tokens = 0
    for text in texts:
        word = text[1:] if text.startswith(b" ") else text
        # Most events, without a call. NOTE: of bytes, only ASCII letters are alphabetic.
        if len(word) <= _LONGEST_WORD and word.isalpha():
            tokens += 1
        else:
            tokens += estimated_tokens(text.decode(errors="replace"))
    return tokens
