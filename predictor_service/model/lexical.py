"""Lexical measures of a prompt: size and shape, scripts, code, the kind of answer requested, and how much of it.

Everything is counted on arrays of code points and word hashes, except amounts: a regular expression finds a number with
a unit ("500 words", "10 blog post ideas").
"""

from __future__ import annotations

import math
import re

import numpy as np
from numpy.typing import NDArray

from predictor_service.model.hashed_text import Codes, Words, code_points, find_words

KEYWORDS: dict[str, str] = {
    "brief": "brief briefly short shorter concise concisely sentence tldr summary summarize summarise summarized "
    "summarizing simple simply few",
    "long": "detail details detailed comprehensive depth essay article blog story report chapter guide step "
    "outline course plan full complete thorough long extensive tutorial proposal letter speech",
    "code": "code function python java javascript typescript html css sql react php implement class def import return "
    "error bug api query script program const void int string var null docker linux bash json",
    "rewrite": "rewrite rephrase translate paraphrase correct proofread improve edit fix polish convert reword grammar",
    "list": "list ideas examples table bullet bullets points top suggest suggestions names titles headlines keywords "
    "options",
    "answer": "reply respond say only understand understood acknowledge ready wait yes just ok okay don't not confirm",
    "persona": "act you pretend ignore previous instructions prompt role expert assistant character",
    "question": "what why how who when where which is are can does do",
    "explain": "explain describe compare discuss analyze analyse difference evaluate elaborate define",
    "create": "write create generate make give provide draft design build develop compose",
    "post": "email tweet linkedin instagram post caption slogan tagline subject headline title bio joke poem song "
    "lyrics haiku",
    "continue": "continue go next more again another further expand",
}
"""Words that request a kind of answer. A word belongs to one kind only."""

UNITS = {
    "words": ("word",),
    "paragraphs": ("paragraph",),
    "sentences": ("sentence", "line"),
    "pages": ("page",),
    "minutes": ("minute", "hour", "day", "week"),
    "items": (
        *("item", "idea", "example", "question", "tip", "way", "point", "step", "name", "title", "reason", "topic"),
        *("bullet", "option", "tweet", "post"),
    ),
    "chars": ("character", "char", "letter"),
}

HEAD, TAIL = 120, 160
"""Characters at the start and the end in which keywords are flagged, because instructions are there."""

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
    "latin_share",
    "cyrillic_share",
    "arabic_share",
    "indic_share",
    "kana_share",
    "han_share",
    "hangul_share",
    "log_question_marks",
    "ends_with_question_mark",
    "ends_with_colon",
    "ends_with_full_stop",
    "starts_upper",
    "starts_lower",
    "log_code_marks",
    "has_code_fence",
    "has_url",
    "log_list_lines",
    "log_indented_lines",
    "log_empty_lines",
    "log_first_line",
    "log_last_line",
    "log_longest_line",
    "log_sentence_marks",
    "log_words_per_sentence_mark",
    "log_numbers",
    "log_quotes",
    "log_brackets",
    "distinct_word_share",
    "last_question_mark_position",
    "log_longest_word",
    *(f"log_requested_{unit}" for unit in UNITS),
    *(f"{where}_{kind}" for kind in KEYWORDS for where in ("log", "head", "tail")),
    *(f"chars_over_{bound}" for bound in _LENGTH_BINS),
)
LEXICAL_SIZE = len(LEXICAL_NAMES)

_UNIT_OF = {noun: unit for unit, nouns in UNITS.items() for noun in nouns}
# NOTE: it begins with a digit and its repeats do not backtrack, so that many numbers in a prompt cost little.
_AMOUNT = re.compile(r"(\d(?<![\d.,]\d)\d{0,4}+)(?: ?\+)?[ -]{0,2}+(?:\w++ )?(" + "|".join(_UNIT_OF) + r")s?\b")
_LIST_LINE = re.compile(r"^[ \t]*(?:[-*•]|\d+[.)])\s", re.MULTILINE)

# Code points at which the script changes, and the column that each range counts towards (0: none).
_SCRIPT_EDGES = np.array(
    [0xC0, 0x250, 0x400, 0x530, 0x600, 0x700, 0x900, 0xE00, 0x3040, 0x3100, 0x3400, 0xA000, 0xAC00, 0xD7B0]
)
_SCRIPT_OF = np.array([0, 1, 0, 2, 0, 3, 0, 4, 0, 5, 0, 6, 0, 7, 0])
_SCRIPTS = 7
_CODE_MARKS = np.frombuffer(b"{}[]();=<>_", dtype=np.uint8)


def _hashed_keywords() -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Return the hashes of all keywords in ascending order, and the kind of each."""
    kinds = {word: kind for kind, words in enumerate(KEYWORDS.values()) for word in words.split()}
    hashes = np.array([int(find_words(code_points(word)).hashes[0]) for word in kinds], dtype=np.uint64)
    order = np.argsort(hashes)
    return hashes[order], np.array(list(kinds.values()), dtype=np.int64)[order]


_KEYWORD_HASHES, _KEYWORD_KINDS = _hashed_keywords()


def lexical_measures(full_chars: int, kept: str, cased: Codes, words: Words) -> NDArray[np.float32]:
    """Return the measures in the order of `LEXICAL_NAMES`; shape (LEXICAL_SIZE,), finite.

    ``full_chars``: characters of the whole prompt. ``kept``: the part that is read, in its original case.
    ``cased``: the code points of ``kept``. ``words``: the words of its lower case.
    """
    chars = max(len(cased), 1)
    histogram = np.bincount(np.minimum(cased, 128), minlength=129)
    scripts = _script_shares(cased, chars) if histogram[128] else [0.0] * _SCRIPTS
    count = len(words.starts)
    space = int(histogram[9:14].sum() + histogram[32])
    upper, digits = int(histogram[65:91].sum()), int(histogram[48:58].sum())
    letters = upper + int(histogram[97:123].sum())
    ascii_rest = int(histogram[:128].sum()) - letters - digits - space
    stripped = kept.strip()
    stops = int(histogram[46] + histogram[33] + histogram[63])
    line = _line_measures(cased)
    return np.array(
        [
            math.log1p(full_chars),
            math.log1p(count),
            math.log1p(int(histogram[10])),
            min((chars - space) / max(count, 1), 30.0),
            upper / chars,
            digits / chars,
            ascii_rest / chars,
            space / chars,
            int(histogram[128]) / chars,
            *scripts,
            math.log1p(int(histogram[63])),
            float(stripped.endswith("?")),
            float(stripped.endswith(":")),
            float(stripped.endswith(".")),
            float(stripped[:1].isupper()),
            float(stripped[:1].islower()),
            math.log1p(int(histogram[_CODE_MARKS].sum())),
            float("```" in kept),
            float("http" in kept),
            math.log1p(len(_LIST_LINE.findall(kept))) if histogram[10] else 0.0,
            *line,
            math.log1p(stops),
            math.log1p(count / (stops + 1)),
            math.log1p(int(np.count_nonzero(np.diff((cased - np.uint32(48) < 10).astype(np.int8), prepend=0) == 1))),
            math.log1p(int(histogram[34])),
            math.log1p(int(histogram[91])),
            len(np.unique(words.hashes)) / max(count, 1),
            (kept.rfind("?") + 1) / chars,
            math.log1p(int((words.ends - words.starts).max())) if count else 0.0,
            *_requested_amounts(kept, digits),
            *_keyword_measures(words, chars),
            *(float(full_chars > bound) for bound in _LENGTH_BINS),
        ],
        dtype=np.float32,
    )


def _script_shares(cased: Codes, chars: int) -> list[float]:
    wide = cased[cased >= 0xC0]
    found = np.bincount(_SCRIPT_OF[np.searchsorted(_SCRIPT_EDGES, wide, side="right")], minlength=_SCRIPTS + 1)
    return [float(x) / chars for x in found[1:]]


def _line_measures(cased: Codes) -> list[float]:
    """Return logs of: indented lines, empty lines, characters of the first, the last and the longest line."""
    breaks = np.flatnonzero(cased == 10)
    if not len(breaks):
        return [0.0, 0.0, *[math.log1p(len(cased))] * 3]
    edges = np.concatenate([[-1], breaks, [len(cased)]])
    long = np.diff(edges) - 1
    after = cased[breaks[breaks + 1 < len(cased)] + 1]
    indented = int(((after == 32) | (after == 9)).sum())
    return [math.log1p(float(x)) for x in (indented, (long == 0).sum(), long[0], long[-1], long.max())]


def _requested_amounts(kept: str, digits: int) -> list[float]:
    """Return the log of the first amount requested in each unit; 0 if there is none."""
    amounts = dict.fromkeys(UNITS, 0.0)
    if digits:
        for found in _AMOUNT.finditer(kept.lower()):
            unit = _UNIT_OF[found[2]]
            amounts[unit] = amounts[unit] or math.log1p(int(found[1]))
    return list(amounts.values())


def _keyword_measures(words: Words, chars: int) -> list[float]:
    """Return for each kind of keyword: log of its count, 1 if it occurs in the head, 1 if it occurs in the tail."""
    at = np.minimum(np.searchsorted(_KEYWORD_HASHES, words.hashes), len(_KEYWORD_HASHES) - 1)
    hit = _KEYWORD_HASHES[at] == words.hashes
    kinds, starts = _KEYWORD_KINDS[at[hit]], words.starts[hit]
    table = np.zeros((len(KEYWORDS), 3))
    table[:, 0] = np.log1p(np.bincount(kinds, minlength=len(KEYWORDS)))
    table[kinds[starts < HEAD], 1] = 1.0
    table[kinds[starts >= chars - TAIL], 2] = 1.0
    return [float(x) for x in table.ravel()]
