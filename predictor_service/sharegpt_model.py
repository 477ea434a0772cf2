"""Training and evaluating on ShareGPT: data, split, fit and card put together, with the same split on both
sides."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from predictor_service.evaluate import quality, rounded, speed
from predictor_service.features import FEATURES_VERSION, prompt_features
from predictor_service.length_model import Card, LengthModel, ModelUnusable
from predictor_service.sharegpt import (
    CENSORED_FROM,
    CENSORED_TO,
    DATASET,
    TOKENIZER,
    Rows,
    Split,
    Turn,
    read_turns,
    split_by_conversation,
)
from predictor_service.train import Examples, Recipe, fit_length_model

MODEL_NAME = "sharegpt-rank-ridge"

Progress = Callable[[str, float], None]
"""Called with what is going on and the share of it that is done (0 to 1)."""


@dataclass(slots=True)
class Dataset:
    """The turns and their split. ``examples`` is worth caching by the caller: it costs 0.3 ms a turn."""

    turns: list[Turn]
    split: Split

    def examples(self, rows: Rows, progress: Callable[[float], None] = lambda share: None) -> Examples:
        """These rows as features and lengths."""
        features = []
        for done, row in enumerate(rows):
            features.append(prompt_features(self.turns[row].prompt))
            if done % 256 == 0:
                progress(done / len(rows))
        picked = [self.turns[row] for row in rows]
        return Examples(
            features,
            np.array([turn.length for turn in picked], dtype=np.float64),
            np.array([turn.censored for turn in picked], dtype=np.bool_),
            np.array([turn.first for turn in picked], dtype=np.bool_),
        )


def read_dataset(seed: int, progress: Progress) -> Dataset:
    """Read and split. Raises `predictor_service.sharegpt.TrainingDataMissing`."""
    turns = read_turns(lambda share: progress("reading ShareGPT", share))
    return Dataset(turns, split_by_conversation(turns, seed))


def train_on_sharegpt(output: Path, seed: int, progress: Progress) -> Card:
    """Fit on the training part, calibrate on the validation part, measure on the test part, write into
    ``output``.

    Returns the card that was written. The same seed gives the same model, to the last bit on one machine.
    Raises `predictor_service.sharegpt.TrainingDataMissing`; OSError when ``output`` cannot be written.
    """
    output.mkdir(parents=True, exist_ok=True)
    data, recipe = read_dataset(seed, progress), Recipe()
    split = data.split
    fitted = data.examples(np.concatenate([split.train, split.later]), lambda share: progress("hashing prompts", share))
    validation, test = data.examples(split.validation), data.examples(split.test)
    progress("hashing prompts", 1.0)
    model = fit_length_model(
        fitted,
        validation,
        _card(seed, split, recipe),
        recipe,
        lambda iteration: progress("fitting", iteration / recipe.max_iterations),
    )
    progress("fitting", 1.0)
    reference = fitted.length[fitted.first]
    model.card["metrics"] = {
        "test": rounded(quality(model, test, reference)),
        "validation": rounded(quality(model, validation, reference)),
    }
    model.save(output)
    return model.card


def evaluate_on_sharegpt(model: LengthModel, progress: Progress) -> dict[str, Any]:
    """Quality and speed on the test part that ``model``'s card names, which its training has not seen.

    Raises `predictor_service.sharegpt.TrainingDataMissing`; `ModelUnusable` when the card does not say how
    its data were split.
    """
    seed = model.card.get("seed")
    if not isinstance(seed, int) or model.card.get("dataset") != DATASET:
        raise ModelUnusable("this model's card names no ShareGPT split, so nothing is known to be held out from it")
    data = read_dataset(seed, progress)
    test = data.examples(data.split.test, lambda share: progress("hashing prompts", share))
    reference = np.array([data.turns[row].length for row in data.split.train], dtype=np.float64)
    metrics = quality(model, test, reference)
    progress("timing", 0.0)
    metrics |= speed(model, [data.turns[row].prompt for row in data.split.test])
    progress("timing", 1.0)
    return {"model": model.name, "seed": seed, "split": "test", **rounded(metrics)}


def _card(seed: int, split: Split, recipe: Recipe) -> Card:
    return {
        "model": f"{MODEL_NAME}-{FEATURES_VERSION}",
        "features_version": FEATURES_VERSION,
        "what": "Ridge on hashed word and character n-grams and lexical measures, fitted to the answer's rank among "
        "answers, read as tokens through group-wise Kaplan-Meier quantiles of the validation part.",
        "length_is": "the calibrated median, equal to p50",
        "dataset": DATASET,
        "tokenizer": TOKENIZER,
        "seed": seed,
        "split": {
            "by": "conversation; conversations that open with one and the same prompt stay together",
            "train_first_turns": len(split.train),
            "train_later_turns": len(split.later),
            "validation": len(split.validation),
            "test": len(split.test),
        },
        "censoring": f"answers of {CENSORED_FROM} to {CENSORED_TO} tokens hit the output limit of their day: ranked "
        "among the longest in the fit, right-censored in the calibration, taken as recorded in the error metrics",
        "recipe": asdict(recipe),
        "recipe_chosen_on": "the validation part of seed 0; no test part was looked at",
        "limits": "Trained on ChatGPT's answers of 2023. On another model the ranking transfers better than the scale: "
        "recalibrate from observed lengths. One prompt at a time: no conversation history, no sampling parameters.",
    }
