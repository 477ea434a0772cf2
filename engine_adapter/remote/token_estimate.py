"""Estimates how many tokens an output text has, for servers that report no usage."""

from __future__ import annotations

import re

# A word of up to eight letters, a run of up to four symbols, or one ideograph, syllable or kana.
_PIECE = re.compile(
    r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]{1,8}|[^\w\s]{1,4}"
)

_SAMPLE_CHARS = 4096
"""Characters of a text that are looked at. The estimate is scaled to the whole text. Bounds the time."""


def estimated_tokens(text: str) -> int:
    """Estimated number of tokens in ``text``; at least 1."""
    sample = text[:_SAMPLE_CHARS]
    pieces = sum(1 for _ in _PIECE.finditer(sample))
    return max(1, round(pieces * len(text) / len(sample))) if sample else 1
