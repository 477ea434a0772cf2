"""Compares families of length models on the validation and test parts of ShareGPT (docs/results/predictor.md).

    OMP_NUM_THREADS=1 python -m benchmarks.predictor.families [--minilm FOLDER]

Prints Kendall's tau / mean absolute error in tokens; CPU, seed 0, about five minutes on one core. Needs the extra
'train'. The MiniLM rows also need torch, transformers and ``FOLDER``, a copy of sentence-transformers/all-MiniLM-L6-v2.

NOTE: no row is calibrated, so that the shipped recipe differs from its model card by the factor of the median.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray

from predictor_service.model.length_model import tree_inputs
from predictor_service.training.datasets import Dataset, read_dataset
from predictor_service.training.evaluate import kendall_tau
from predictor_service.training.fit import (
    Examples,
    Recipe,
    folds_by_group,
    inverse_document_frequency,
    linear_stage,
    mid_ranks,
    tree_stage,
)

Floats = NDArray[np.float64]
Columns = tuple[Floats, Floats, Floats]
"""One array each for training, validation and test rows."""

PROMPT_TOKENS = 128
"""Tokens of a prompt that MiniLM reads."""


@dataclass(slots=True)
class Study:
    """Training, validation and test parts, with linear scores and lexical measures of their rows."""

    parts: tuple[Examples, Examples, Examples]
    scores: Columns
    lexical: Columns

    def trees(self, scores: Columns, lexical: Columns, rows: NDArray[np.bool_] | None = None) -> tuple[Floats, Floats]:
        """Fit trees to ``rows`` of the training part and return their predictions on validation and test part."""
        train = self.parts[0]
        kept = np.flatnonzero(np.ones(len(train.length), dtype=np.bool_) if rows is None else rows)
        selected = Examples(
            [train.features[row] for row in kept],
            train.length[kept],
            train.censored[kept],
            train.first[kept],
            train.group[kept],
        )
        fitted = tree_stage(selected, scores[0][kept], lexical[0][kept], Recipe())
        later = [np.zeros(len(part.length), dtype=np.bool_) for part in self.parts]
        a, b = (fitted.predict(tree_inputs(scores[part], lexical[part], later[part])) for part in (1, 2))
        return a, b

    def row(self, name: str, predicted: tuple[Floats, Floats]) -> None:
        """Print one row of the table."""
        cells = [
            f"{kendall_tau(estimate, part.length):.3f} / {np.abs(estimate - part.length).mean():.1f}"
            for estimate, part in zip(predicted, self.parts[1:], strict=True)
        ]
        sys.stdout.write(f"| {name} | {' | '.join(cells)} |\n")
        sys.stdout.flush()


def main() -> None:
    """Fit and print every row."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--minilm", type=Path)
    options = arguments.parse_args()
    data = read_dataset(0, lambda stage, share: None)
    split = data.split
    examples = [data.examples(np.concatenate([split.train, split.later]))]
    parts = (examples[0], data.examples(split.validation), data.examples(split.test))
    train, opening = parts[0], parts[0].first
    lexical = tuple(np.array([row.lexical for row in part.features], dtype=np.float64) for part in parts)
    columns = (lexical[0], lexical[1], lexical[2])
    scores = _linear(parts, columns, Recipe())
    study = Study(parts, scores, columns)
    no_columns = (
        np.zeros((len(train.length), 0)),
        np.zeros((len(parts[1].length), 0)),
        np.zeros((len(parts[2].length), 0)),
    )
    median = np.median(train.length[opening])
    study.row("constant median", (np.full(len(parts[1].length), median), np.full(len(parts[2].length), median)))
    study.row("trees on the lexical measures", study.trees(no_columns, columns))
    rank = (scores[0][opening, 0], scores[1][:, 0], scores[2][:, 0])
    study.row("ridge on rank", _rank_to_tokens(rank, train.length[opening]))
    study.row("trees on the ridge scores", study.trees(scores, no_columns))
    study.row("shipped recipe, opening turns only", study.trees(scores, columns, opening))
    study.row("shipped recipe", study.trees(scores, columns))
    equal_weights = _linear(
        parts, columns, replace(Recipe(), later_weight=1.0, penalty=6.0, levels=(0.1, 0.25, 0.5, 0.75, 0.9))
    )
    study.row("shipped recipe and a second ridge", study.trees(_joined(scores, equal_weights), columns))
    if options.minilm is not None:
        _minilm_rows(study, data, options.minilm)


def _linear(parts: tuple[Examples, Examples, Examples], lexical: Columns, recipe: Recipe) -> Columns:
    train = parts[0]
    mean = lexical[0][train.first].mean(axis=0)
    scale = np.maximum(lexical[0][train.first].std(axis=0), 1e-6)
    idf = inverse_document_frequency(train.features)
    with TemporaryDirectory() as folder:
        linear, unseen = linear_stage(train, idf, mean, scale, recipe, Path(folder), lambda share: None)
    return unseen, linear.scores(parts[1].features, lexical[1]), linear.scores(parts[2].features, lexical[2])


def _rank_to_tokens(rank: Columns, length: Floats, groups: int = 20) -> tuple[Floats, Floats]:
    """Return tokens for each rank, from the medians of groups of cross-fitted training rows."""
    cut = np.array_split(np.argsort(rank[0]), groups)
    knots = np.array([rank[0][rows].mean() for rows in cut])
    medians = np.maximum.accumulate(np.array([np.median(length[rows]) for rows in cut]))
    # The rank breaks ties where the curve is flat.
    a, b = (np.interp(part, knots, medians) + 1e-6 * part for part in rank[1:])
    return a, b


def _joined(*columns: Columns) -> Columns:
    a, b, c = (np.hstack([group[part] for group in columns]) for part in range(3))
    return a, b, c


def _minilm_rows(study: Study, data: Dataset, folder: Path) -> None:
    train, opening = study.parts[0], study.parts[0].first
    length, fold = train.length[opening], folds_by_group(train.group, Recipe())[opening]
    parts = (data.split.train, data.split.validation, data.split.test)
    a, b, c = (_embed(data.prompts(part), folder) for part in parts)
    design = [np.column_stack([part, np.ones(len(part))]) for part in (a, b, c)]

    def solve(seen: NDArray[np.bool_]) -> Floats:
        rows, target = design[0][seen], mid_ranks(length, among=length)[seen]
        return np.asarray(
            np.linalg.solve(rows.T @ rows + 3.0 * np.eye(rows.shape[1]), rows.T @ target), dtype=np.float64
        )

    unseen = np.zeros(len(length))
    for part in range(Recipe().folds):
        unseen[fold == part] = design[0][fold == part] @ solve(fold != part)
    whole = solve(np.ones(len(length), dtype=np.bool_))
    rank = (unseen, design[1] @ whole, design[2] @ whole)
    study.row("MiniLM, ridge on rank", _rank_to_tokens(rank, length))
    # Only opening turns are embedded and fitted to; they come first in the training part.
    train_columns = np.zeros((len(train.length), a.shape[1] + 1))
    train_columns[opening] = np.column_stack([a, unseen])
    embedding = (train_columns, np.column_stack([b, rank[1]]), np.column_stack([c, rank[2]]))
    study.row("trees on MiniLM and measures", study.trees(embedding, study.lexical, opening))
    study.row("shipped recipe and MiniLM", study.trees(_joined(study.scores, embedding), study.lexical, opening))


def _embed(prompts: list[str], folder: Path) -> Floats:
    """Return the mean of MiniLM's last hidden states, shape (prompts, 384)."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    order = sorted(range(len(prompts)), key=lambda at: len(prompts[at]))
    embedded = np.zeros((len(prompts), model.config.hidden_size))
    with torch.inference_mode():
        for first in range(0, len(order), 32):
            batch = order[first : first + 32]
            encoded = tokenizer(
                [prompts[at] for at in batch],
                truncation=True,
                max_length=PROMPT_TOKENS,
                padding=True,
                return_tensors="pt",
            )
            mask = encoded["attention_mask"][..., None]
            states = model(**encoded).last_hidden_state
            embedded[batch] = ((states * mask).sum(dim=1) / mask.sum(dim=1)).numpy()
    return embedded


if __name__ == "__main__":
    main()
