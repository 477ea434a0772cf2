"""Trains and evaluates models: reads data, splits, fits, measures, and writes the model with its card."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from predictor_service.model.buckets import PAPER_BINS, STRATEGIES
from predictor_service.model.features import FEATURES_VERSION
from predictor_service.model.length_model import Card, LengthModel, LengthPredictor, ModelUnusable
from predictor_service.training.checkpoint import remove_checkpoint
from predictor_service.training.datasets import Dataset, Progress, read_dataset
from predictor_service.training.evaluate import (
    REPORTED_METRICS,
    bucket_row,
    bucket_study,
    measure_speed,
    quality,
    rounded,
)
from predictor_service.training.fit import Recipe, fit_length_model
from predictor_service.training.sharegpt import CENSORED_FROM, CENSORED_TO, DATASET, Rows

if TYPE_CHECKING:
    from predictor_service.model.classifier import LengthClassifier
    from predictor_service.training.fit_classifier import ClassifierRecipe, Labelled

MODEL_NAME = "hashed-stack"


def train_hashed(output: Path, seed: int, data: Path | None, progress: Progress) -> Card:
    """Train the CPU model, write it into ``output`` and return its card.

    It is fitted on the training part, calibrated on the validation part and measured on the test part. On one machine,
    the same seed gives the same model, whether or not the run was interrupted and resumed.

    Raises:
        TrainingDataMissing: ShareGPT is not installed.
        BadData: the file ``data`` cannot be used.
        ValueError: there is too little data.
        OSError: ``output`` cannot be written.
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
        "what": "Cross-fitted ridge on hashed word and character n-grams (targets: rank and logarithm of the output "
        "length, and whether it exceeds each of several lengths), boosted trees on these scores and lexical measures, "
        "then group-wise Kaplan-Meier quantiles of the validation part. Details: docs/predictor.md.",
        "length_is": "the calibrated median, equal to p50",
        "recipe": asdict(recipe),
        "recipe_chosen_on": "the validation part of ShareGPT, seed 0",
        "limits": "Reads one prompt: no conversation history, no sampling parameters. On the answers of another model, "
        "the ranking transfers better than the scale: calibrate with observed lengths.",
    }
    model = fit_length_model(fitted, validation, card, recipe, output, lambda share: progress("fitting", share))
    return _measure_and_save(model, dataset, output)


def train_classifier(output: Path, recipe: ClassifierRecipe, data: Path | None, progress: Progress) -> Card:
    """Fine-tune the paper's model, write it into ``output`` and return its card.

    It is fitted on the training part, calibrated on the validation part and measured on the test part. Raises the same
    errors as `train_hashed`.
    """
    from predictor_service.training.fit_classifier import fit_classifier

    output.mkdir(parents=True, exist_ok=True)
    dataset = read_dataset(recipe.seed, progress, data)
    split = dataset.split
    card = _card(dataset, recipe.seed) | {
        "model": f"classifier-{Path(recipe.base).name}-{recipe.bins}-{recipe.strategy}",
        "what": "SCORPIO's length predictor: last hidden state of a language model, linear layer, softmax over bins.",
        "length_is": "the median of the predicted distribution, equal to p50",
    }
    train, validation = _labelled(dataset, split.train), _labelled(dataset, split.validation)
    model = fit_classifier(train, validation, recipe, card, output, lambda share: progress("fine-tuning", share))
    return _measure_and_save(model, dataset, output)


def _measure_and_save(model: LengthModel | LengthClassifier, dataset: Dataset, output: Path) -> Card:
    """Measure and write the model, then delete the checkpoint; return the card."""
    model.card["metrics"] = {"test": rounded(_quality(model, dataset, dataset.split.test))}
    model.save(output)
    remove_checkpoint(output)
    return model.card


def evaluate_held_out(model: LengthPredictor, data: Path | None, progress: Progress) -> dict[str, float]:
    """Return `REPORTED_METRICS` of ``model`` on answers that it was not trained on.

    On its training data, as named in its card, these are the test part of the split. On other data, they are all
    opening turns.

    Raises:
        ModelUnusable: the card does not say how the training data was split, or there is no data to evaluate on.
        TrainingDataMissing: ShareGPT is not installed.
        BadData: the file ``data`` cannot be used.
    """
    dataset, rows, reference = _held_out(model, data, progress)
    metrics = _quality(model, dataset, rows, reference)
    progress("timing", 0.0)
    metrics |= measure_speed(model, [dataset.turns[row].features or dataset.turns[row].prompt for row in rows])
    progress("timing", 1.0)
    return {name: round(metrics[name], 4) for name in REPORTED_METRICS}


def study_buckets(
    model: LengthPredictor,
    data: Path | None,
    recipe: ClassifierRecipe | None,
    progress: Progress,
) -> list[dict[str, Any]]:
    """Return table 5 of the paper on held-out answers: every number of bins, both strategies.

    Without a ``recipe``, the predictions of ``model`` are cut into each set of bins. With a ``recipe``, a classifier is
    fine-tuned from its base for each set.
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

            def report(share: float, stage: str = stage) -> None:
                progress(stage, share)

            with TemporaryDirectory() as folder:
                variant = replace(recipe, strategy=strategy, bins=count)
                model = fit_classifier(train, validation, variant, {"model": stage}, Path(folder), report)
            predicted = model.classify(dataset.prompts(rows))
            row = bucket_row(model.buckets, predicted, dataset.lengths(rows))
            table.append({"strategy": strategy, "asked_bins": count} | row)
    return table


def _held_out(
    model: LengthPredictor, data: Path | None, progress: Progress
) -> tuple[Dataset, Rows, np.ndarray[Any, np.dtype[np.float64]]]:
    """Return the data, the rows that ``model`` was not trained on, and the lengths behind the constant prediction."""
    seed = model.card.get("seed")
    if not isinstance(seed, int):
        raise ModelUnusable("the card of this model has no seed, so that its held-out data is unknown")
    if data is None and model.card.get("dataset") != DATASET:
        raise ModelUnusable("this model was not trained on ShareGPT: evaluate it on a file, with --data")
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
    censoring = f"answers of {CENSORED_FROM} to {CENSORED_TO} tokens reached the output limit of the service"
    return {
        "dataset": dataset.name,
        "tokenizer": dataset.tokenizer,
        "seed": seed,
        "split": {
            "by": "conversation; conversations that open with the same prompt stay together",
            "train_first_turns": len(split.train),
            "train_later_turns": len(split.later),
            "validation": len(split.validation),
            "test": len(split.test),
        },
        "censoring": censoring if dataset.name == DATASET else "as marked in the file",
    }
