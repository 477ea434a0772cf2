"""Data for training and evaluation: ShareGPT from its package, or a JSON-lines file.

A line of a file holds one finished answer, either with its prompt,

    {"prompt": text, "length": tokens, "censored": false, "conversation": name, "first": true}

or with the features of the prompt, as ``antares predictor collect`` writes them:

    {"features": {"indices": [...], "counts": [...], "lexical": [...]}, "features_version": N, "length": tokens,
     "censored": bool, "model": name, "slo_class": name}

Only the prompt or the features, and ``length``, are required. ``conversation`` keeps the turns of a conversation on the
same side of the split. ``first`` is false for turns that do not open one. ``censored`` says that the answer was
truncated, so that its length is a lower bound. Errors name the line and the field, and never quote the value.
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

MIN_OPENING_TURNS = 200
"""Smallest number of opening turns in a file: with fewer, there is too little data to fit, calibrate and test."""

Progress = Callable[[str, float], None]
"""Called with the name of a stage and the share of it that is done (0 to 1)."""


class BadData(Exception):  # noqa: N818
    """A data file that cannot be used. The message names the line and the field."""


@dataclass(slots=True, frozen=True)
class Dataset:
    """Turns, their split, and the names of data and tokenizer for the model card."""

    turns: list[Turn]
    split: Split
    name: str
    tokenizer: str

    def examples(self, rows: Rows, progress: Callable[[float], None] = lambda share: None) -> Examples:
        """Return features and lengths of these rows. The features of a text take a third of a millisecond."""
        features = []
        for done, row in enumerate(rows):
            turn = self.turns[row]
            features.append(turn.features if turn.features is not None else prompt_features(turn.prompt))
            if done % 256 == 0:
                progress(done / len(rows))
        turns = [self.turns[row] for row in rows]
        return Examples(
            features,
            self.lengths(rows),
            np.array([turn.censored for turn in turns], dtype=np.bool_),
            np.array([turn.first for turn in turns], dtype=np.bool_),
            groups_by_opening(turns),
        )

    def lengths(self, rows: Rows) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        """Return the output lengths of these rows in tokens, shape (rows,)."""
        return np.array([self.turns[row].length for row in rows], dtype=np.float64)

    def prompts(self, rows: Rows) -> list[str]:
        """Return the prompts of these rows.

        Raises:
            BadData: the data hold features instead of prompts.
        """
        if any(self.turns[row].features is not None for row in rows):
            raise BadData(f"{self.name} holds features, but this model reads text: use lines with a 'prompt'")
        return [self.turns[row].prompt for row in rows]

    def inputs(self, rows: Rows, text: bool) -> Sequence[Any]:
        """Return the inputs for a model's ``predict``: prompts if it reads ``text``, else features."""
        return self.prompts(rows) if text else self.examples(rows).features


def read_dataset(seed: int, progress: Progress, data: Path | None = None) -> Dataset:
    """Return ShareGPT, or the file (or folder of ``*.jsonl`` files) at ``data``, split with ``seed``.

    Raises:
        TrainingDataMissing: the package with ShareGPT is not installed.
        BadData: the file cannot be used.
    """
    if data is None:
        turns = read_turns(lambda share: progress("reading ShareGPT", share))
        return Dataset(turns, split_by_conversation(turns, seed), DATASET, TOKENIZER)
    turns, digest = read_jsonl(data, lambda share: progress(f"reading {data.name}", share))
    if sum(turn.first for turn in turns) < MIN_OPENING_TURNS:
        raise BadData(f"{data} holds fewer than {MIN_OPENING_TURNS} opening turns, too few for training or evaluation")
    return Dataset(
        turns, split_by_conversation(turns, seed), f"{data.name} (blake2b {digest})", "the file's own counts"
    )


def read_jsonl(data: Path, progress: Callable[[float], None] = lambda share: None) -> tuple[list[Turn], str]:
    """Return the turns and a digest of a file, or of the ``*.jsonl`` files of a folder in order of name.

    Raises:
        BadData: a file cannot be read, or a line is malformed.
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
    except OSError as error:
        raise BadData(f"{data} cannot be read: {error.strerror}") from None
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
        raise BadData(f"{where}: 'features_version' must be {FEATURES_VERSION}, the version that this release computes")
    fields = entry["features"]
    if not isinstance(fields, dict):
        raise BadData(f"{where}: 'features' must be an object")
    try:
        indices, counts = _arrays(fields)
        return checked_features(indices, counts, fields.get("lexical"))
    except MalformedFeatures as error:
        raise BadData(f"{where}: {error}") from None


def _arrays(fields: dict[str, Any]) -> Iterator[np.ndarray[Any, np.dtype[np.int64]]]:
    for name in ("indices", "counts"):
        value = fields.get(name)
        whole = isinstance(value, list) and all(isinstance(x, int) and 0 <= x < 1 << 31 for x in value)
        if not whole:
            raise MalformedFeatures(f"features.{name} must be an array of whole numbers")
        yield np.array(value, dtype=np.int64)
