"""What a model is trained and measured on: ShareGPT from its package, or a JSON-lines file of one's own.

A line holds one finished answer, either beside its prompt,

    {"prompt": text, "length": tokens, "censored": false, "conversation": name, "first": true}

of which only ``prompt`` and ``length`` are needed (``conversation`` keeps turns that belong together on one side of the
split, ``first`` is false for turns that do not open one), or beside the prompt's features, as ``antares predictor
collect`` writes them:

    {"features": {"indices": [...], "counts": [...], "lexical": [...]}, "features_version": N, "length": tokens,
     "censored": bool, "model": name, "slo_class": name}

``censored`` says that the answer was cut off, so that its length is a lower bound. Errors name the line and the field,
never the value.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from predictor_service.model.features import (
    FEATURES_VERSION,
    Features,
    MalformedFeatures,
    checked_features,
    prompt_features,
)
from predictor_service.training.fit import Examples
from predictor_service.training.sharegpt import (
    DATASET,
    TOKENIZER,
    Rows,
    Split,
    Turn,
    groups_by_opening,
    read_turns,
    split_by_conversation,
)

LEAST_ANSWERS = 200
"""A file with fewer opening turns than this is refused: nothing could be fitted, calibrated and measured on it."""

Progress = Callable[[str, float], None]
"""Called with what is going on and the share of it that is done (0 to 1)."""


class BadData(Exception):  # noqa: N818 - it names what is wrong
    """A data file that cannot be used; the message names the line and the field."""


@dataclass(slots=True, frozen=True)
class Dataset:
    """The turns, their split, and what the model card says of them."""

    turns: list[Turn]
    split: Split
    name: str
    tokenizer: str

    def examples(self, rows: Rows, progress: Callable[[float], None] = lambda share: None) -> Examples:
        """These rows as features and lengths; a third of a millisecond each where they come as text."""
        features = []
        for done, row in enumerate(rows):
            turn = self.turns[row]
            features.append(turn.features if turn.features is not None else prompt_features(turn.prompt))
            if done % 256 == 0:
                progress(done / len(rows))
        picked = [self.turns[row] for row in rows]
        return Examples(
            features,
            self.lengths(rows),
            np.array([turn.censored for turn in picked], dtype=np.bool_),
            np.array([turn.first for turn in picked], dtype=np.bool_),
            groups_by_opening(picked),
        )

    def lengths(self, rows: Rows) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        """Their answers' lengths, tokens; shape (rows,)."""
        return np.array([self.turns[row].length for row in rows], dtype=np.float64)

    def prompts(self, rows: Rows) -> list[str]:
        """Their texts. Raises `BadData` where the data hold features instead."""
        if any(self.turns[row].features is not None for row in rows):
            raise BadData(f"{self.name} holds features, and this model reads text: give it lines with a 'prompt'")
        return [self.turns[row].prompt for row in rows]

    def inputs(self, rows: Rows, text: bool) -> Sequence[Any]:
        """What a model's ``predict`` takes: the prompts for one that reads ``text``, else their features."""
        return self.prompts(rows) if text else self.examples(rows).features


def read_dataset(seed: int, progress: Progress, data: Path | None = None) -> Dataset:
    """ShareGPT, or the file (or folder of ``*.jsonl`` files) at ``data``, split with ``seed``.

    Raises `predictor_service.training.sharegpt.TrainingDataMissing` without the package; `BadData` for the file.
    """
    if data is None:
        turns = read_turns(lambda share: progress("reading ShareGPT", share))
        return Dataset(turns, split_by_conversation(turns, seed), DATASET, TOKENIZER)
    turns, digest = read_jsonl(data, lambda share: progress(f"reading {data.name}", share))
    if sum(turn.first for turn in turns) < LEAST_ANSWERS:
        raise BadData(f"{data} holds fewer than {LEAST_ANSWERS} opening turns: too little to train or measure on")
    return Dataset(
        turns, split_by_conversation(turns, seed), f"{data.name} (blake2b {digest})", "the file's own counts"
    )


def read_jsonl(data: Path, progress: Callable[[float], None] = lambda share: None) -> tuple[list[Turn], str]:
    """The turns of a file or of a folder's ``*.jsonl`` files in order of name, and a digest of their bytes.

    Raises `BadData`.
    """
    files = sorted(data.glob("*.jsonl")) if data.is_dir() else [data]
    if not files:
        raise BadData(f"{data} holds no .jsonl file")
    digest, turns = hashlib.blake2b(digest_size=8), []
    try:
        total = sum(file.stat().st_size for file in files) or 1
        read = 0
        for file in files:
            with file.open("rb") as lines:
                for number, line in enumerate(lines, start=1):
                    digest.update(line)
                    read += len(line)
                    if line.strip():
                        turns.append(_turn(line, f"{file.name}, line {number}"))
                    if number % 256 == 0:
                        progress(read / total)
    except OSError as failed:
        raise BadData(f"{data} cannot be read: {failed.strerror}") from None
    progress(1.0)
    return turns, digest.hexdigest()


def _turn(line: bytes, where: str) -> Turn:
    try:
        entry = orjson.loads(line)
    except orjson.JSONDecodeError:
        raise BadData(f"{where}: not valid JSON") from None
    if not isinstance(entry, dict):
        raise BadData(f"{where}: not a JSON object")
    length, censored, first = entry.get("length"), entry.get("censored", False), entry.get("first", True)
    if isinstance(length, bool) or not isinstance(length, int) or not 1 <= length <= 1 << 30:
        raise BadData(f"{where}: 'length' must be a whole number of tokens, at least 1")
    for name, flag in (("censored", censored), ("first", first)):
        if not isinstance(flag, bool):
            raise BadData(f"{where}: {name!r} must be true or false")
    prompt, features = entry.get("prompt"), None
    if "features" in entry:
        features, prompt = _features(entry, where), ""
    elif not isinstance(prompt, str):
        raise BadData(f"{where}: needs 'prompt' (text) or 'features'")
    conversation = entry.get("conversation", where)
    if not isinstance(conversation, str):
        raise BadData(f"{where}: 'conversation' must be text")
    return Turn(conversation, first, prompt, length, censored, features)


def _features(entry: dict[str, Any], where: str) -> Features:
    if entry.get("features_version") != FEATURES_VERSION:
        raise BadData(
            f"{where}: 'features_version' must be {FEATURES_VERSION}; lines of another one are of no use here"
        )
    held = entry["features"]
    if not isinstance(held, dict):
        raise BadData(f"{where}: 'features' must be an object")
    try:
        indices, counts = _arrays(held)
        return checked_features(indices, counts, held.get("lexical"))
    except MalformedFeatures as wrong:
        raise BadData(f"{where}: {wrong}") from None


def _arrays(held: dict[str, Any]) -> Iterator[np.ndarray[Any, np.dtype[np.int64]]]:
    for name in ("indices", "counts"):
        value = held.get(name)
        whole = isinstance(value, list) and all(isinstance(x, int) and 0 <= x < 1 << 31 for x in value)
        if not whole:
            raise MalformedFeatures(f"features.{name} must be an array of whole numbers")
        yield np.array(value, dtype=np.int64)
