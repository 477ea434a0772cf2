"""Training and evaluating: data, split, fit and card put together, with the same split on both sides."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from predictor_service.model.buckets import PAPER_BINS, STRATEGIES
from predictor_service.model.features import FEATURES_VERSION
from predictor_service.model.length_model import Card, LengthModel, LengthPredictor, ModelUnusable
from predictor_service.training.checkpoint import forget
from predictor_service.training.datasets import Dataset, Progress, read_dataset
from predictor_service.training.evaluate import MEASURES, bucket_row, bucket_study, quality, rounded, speed
from predictor_service.training.fit import Recipe, fit_length_model
from predictor_service.training.sharegpt import CENSORED_FROM, CENSORED_TO, DATASET, Rows

if TYPE_CHECKING:
    from predictor_service.model.classifier import LengthClassifier
    from predictor_service.training.fit_classifier import ClassifierRecipe, Labelled

MODEL_NAME = "hashed-stack"


def train_hashed(output: Path, seed: int, data: Path | None, progress: Progress) -> Card:
    """Fit the CPU model on the training part, calibrate on the validation part, measure on the test part, write it.

    Returns the card that was written. The same seed gives the same model on one machine, interrupted or not. Raises
    `predictor_service.training.sharegpt.TrainingDataMissing`; `predictor_service.training.datasets.BadData`;
    ValueError with too little
    data; OSError when ``output`` cannot be written.
    """
    output.mkdir(parents=True, exist_ok=True)
    dataset, recipe = read_dataset(seed, progress, data), Recipe(seed=seed)
    split = dataset.split
    fitted = dataset.examples(
        np.concatenate([split.train, split.later]), lambda share: progress("hashing prompts", share)
    )
    validation = dataset.examples(split.validation)
    progress("hashing prompts", 1.0)
    card = _card(dataset, seed) | {
        "model": f"{MODEL_NAME}-{FEATURES_VERSION}",
        "features_version": FEATURES_VERSION,
        "what": "Cross-fitted ridge on hashed word and character n-grams (the answer's rank, its logarithm, whether it "
        "passes each of a row of lengths), boosted trees on those scores and lexical measures, read as tokens through "
        "group-wise Kaplan-Meier quantiles of the validation part. docs/predictor.md tells more.",
        "length_is": "the calibrated median, equal to p50",
        "recipe": asdict(recipe),
        "recipe_chosen_on": "the validation part of ShareGPT, seed 0",
        "limits": "One prompt at a time: no conversation history, no sampling parameters. On another model's answers "
        "the ranking transfers better than the scale: recalibrate from observed lengths.",
    }
    model = fit_length_model(fitted, validation, card, recipe, output, lambda share: progress("fitting", share))
    return _finished(model, dataset, output)


def train_classifier(output: Path, recipe: ClassifierRecipe, data: Path | None, progress: Progress) -> Card:
    """Fine-tune the paper's family on the training part, set its levels on the validation part, measure it on the test
    part, write it into ``output``; see `train_hashed` for what it raises.
    """
    from predictor_service.training.fit_classifier import fit_classifier

    output.mkdir(parents=True, exist_ok=True)
    dataset = read_dataset(recipe.seed, progress, data)
    split = dataset.split
    card = _card(dataset, recipe.seed) | {
        "model": f"classifier-{Path(recipe.base).name}-{recipe.bins}-{recipe.strategy}",
        "what": "SCORPIO's length predictor: a language model's last hidden state, a linear layer, softmax over bins.",
        "length_is": "the median of the predicted distribution, equal to p50",
    }
    train, validation = _labelled(dataset, split.train), _labelled(dataset, split.validation)
    model = fit_classifier(train, validation, recipe, card, output, lambda share: progress("fine-tuning", share))
    return _finished(model, dataset, output)


def _finished(model: LengthModel | LengthClassifier, dataset: Dataset, output: Path) -> Card:
    """Measure, write, and only then forget the checkpoint; returns the card."""
    model.card["metrics"] = {"test": rounded(_quality(model, dataset, dataset.split.test))}
    model.save(output)
    forget(output)
    return model.card


def evaluate_held_out(model: LengthPredictor, data: Path | None, progress: Progress) -> dict[str, float]:
    """`MEASURES` on answers that ``model`` has not seen.

    On the data that its card names, those are the test part of the split that its training made; on other data, all
    opening turns. Raises as `train_hashed` does, and `ModelUnusable` when the card does not say how its data were
    split.
    """
    dataset, rows, reference = _held_out(model, data, progress)
    metrics = _quality(model, dataset, rows, reference)
    progress("timing", 0.0)
    metrics |= speed(model, [dataset.turns[row].features or dataset.turns[row].prompt for row in rows])
    progress("timing", 1.0)
    return {name: round(metrics[name], 4) for name in MEASURES}


def study_buckets(
    model: LengthPredictor,
    data: Path | None,
    recipe: ClassifierRecipe | None,
    progress: Progress,
) -> list[dict[str, Any]]:
    """The paper's table 5 on held-out answers: every count of bins, both strategies.

    A model that predicts tokens is read through each set of bins. With a ``recipe``, a classifier is fine-tuned from
    its base for each.
    """
    dataset, rows, reference = _held_out(model, data, progress)
    if recipe is None:
        predicted = model.predict(dataset.inputs(rows, model.reads_text))
        return [rounded(row) for row in bucket_study(predicted, dataset.lengths(rows), reference)]
    return [rounded(row) for row in _fine_tuned_study(dataset, rows, recipe, progress)]


def _fine_tuned_study(
    dataset: Dataset, rows: Rows, recipe: ClassifierRecipe, progress: Progress
) -> list[dict[str, Any]]:
    from predictor_service.training.fit_classifier import fit_classifier

    train, validation = _labelled(dataset, dataset.split.train), _labelled(dataset, dataset.split.validation)
    table = []
    for strategy in STRATEGIES:
        for count in PAPER_BINS:
            stage = f"{strategy}, {count} bins"

            def tell(share: float, stage: str = stage) -> None:
                progress(stage, share)

            with TemporaryDirectory() as workshop:
                one = replace(recipe, strategy=strategy, bins=count)
                model = fit_classifier(train, validation, one, {"model": stage}, Path(workshop), tell)
            guessed = model.classify(dataset.prompts(rows))
            row = bucket_row(model.buckets, guessed, dataset.lengths(rows))
            table.append({"strategy": strategy, "asked_bins": count} | row)
    return table


def _held_out(
    model: LengthPredictor, data: Path | None, progress: Progress
) -> tuple[Dataset, Rows, np.ndarray[Any, np.dtype[np.float64]]]:
    """The data, the rows in them that ``model`` has not seen, and the lengths that a constant would be taken from."""
    seed = model.card.get("seed")
    if not isinstance(seed, int):
        raise ModelUnusable("this model's card names no split, so nothing is known to be held out from it")
    if data is None and model.card.get("dataset") != DATASET:
        raise ModelUnusable("this model was not trained on ShareGPT: evaluate it on a file of prompts, with --data")
    dataset = read_dataset(seed, progress, data)
    if model.card.get("dataset") == dataset.name:
        return dataset, dataset.split.test, dataset.lengths(dataset.split.train)
    opening = np.array([row for row, turn in enumerate(dataset.turns) if turn.first], dtype=np.int64)
    return dataset, opening, dataset.lengths(opening)


def _quality(
    model: LengthPredictor,
    dataset: Dataset,
    rows: Rows,
    reference: np.ndarray[Any, np.dtype[np.float64]] | None = None,
) -> dict[str, float]:
    predicted = model.predict(dataset.inputs(rows, model.reads_text))
    censored = np.array([dataset.turns[row].censored for row in rows], dtype=np.bool_)
    if reference is None:
        reference = dataset.lengths(dataset.split.train)
    return quality(predicted, dataset.lengths(rows), censored, reference)


def _labelled(dataset: Dataset, rows: Rows) -> Labelled:
    from predictor_service.training.fit_classifier import Labelled

    return Labelled(dataset.prompts(rows), dataset.lengths(rows))


def _card(dataset: Dataset, seed: int) -> Card:
    split = dataset.split
    censoring = f"answers of {CENSORED_FROM} to {CENSORED_TO} tokens hit the output limit of their day"
    return {
        "dataset": dataset.name,
        "tokenizer": dataset.tokenizer,
        "seed": seed,
        "split": {
            "by": "conversation; conversations that open with one and the same prompt stay together",
            "train_first_turns": len(split.train),
            "train_later_turns": len(split.later),
            "validation": len(split.validation),
            "test": len(split.test),
        },
        "censoring": censoring if dataset.name == DATASET else "as the lines of the file say",
    }
