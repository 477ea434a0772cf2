"""The table of docs/predictor.md: what each family of length models reaches on ShareGPT's validation and test parts.

    OMP_NUM_THREADS=1 python -m benchmarks.predictor.families [--minilm FOLDER]

Kendall's tau / mean absolute error in tokens, CPU, seed 0; needs the extra 'train', and torch and transformers for the
rows with MiniLM (``FOLDER``: a copy of sentence-transformers/all-MiniLM-L6-v2). About five minutes on one core. Nothing
is calibrated here, so the shipped recipe's row differs from its card by the median's factor.
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
"""One array for training, validation and test rows each."""

PROMPT_TOKENS = 128
"""Of a prompt, so many of MiniLM's tokens are read."""


@dataclass(slots=True)
class Study:
    """Three parts, the linear scores of their rows, and their lexical measures."""

    parts: tuple[Examples, Examples, Examples]
    scores: Columns
    lexical: Columns

    def trees(self, scores: Columns, lexical: Columns, rows: NDArray[np.bool_] | None = None) -> tuple[Floats, Floats]:
        """Predictions on validation and test of trees on these columns, fitted to ``rows`` of the training part."""
        train = self.parts[0]
        kept = np.flatnonzero(np.ones(len(train.length), dtype=np.bool_) if rows is None else rows)
        some = Examples(
            [train.features[row] for row in kept],
            train.length[kept],
            train.censored[kept],
            train.first[kept],
            train.group[kept],
        )
        fitted = tree_stage(some, scores[0][kept], lexical[0][kept], Recipe())
        later = [np.zeros(len(part.length), dtype=np.bool_) for part in self.parts]
        a, b = (fitted.predict(tree_inputs(scores[part], lexical[part], later[part])) for part in (1, 2))
        return a, b

    def row(self, name: str, predicted: tuple[Floats, Floats]) -> None:
        """Print one line of the table."""
        cells = [
            f"{kendall_tau(guess, part.length):.3f} / {np.abs(guess - part.length).mean():.1f}"
            for guess, part in zip(predicted, self.parts[1:], strict=True)
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
    nothing = (
        np.zeros((len(train.length), 0)),
        np.zeros((len(parts[1].length), 0)),
        np.zeros((len(parts[2].length), 0)),
    )
    median = np.median(train.length[opening])
    study.row("constant median", (np.full(len(parts[1].length), median), np.full(len(parts[2].length), median)))
    study.row("trees on the lexical measures", study.trees(nothing, columns))
    rank = (scores[0][opening, 0], scores[1][:, 0], scores[2][:, 0])
    study.row("ridge on rank", _read_ranks(rank, train.length[opening]))
    study.row("trees on the ridge scores", study.trees(scores, nothing))
    study.row("shipped recipe, opening turns only", study.trees(scores, columns, opening))
    study.row("shipped recipe", study.trees(scores, columns))
    alike = _linear(
        parts, columns, replace(Recipe(), later_weight=1.0, penalty=6.0, levels=(0.1, 0.25, 0.5, 0.75, 0.9))
    )
    study.row("and a second ridge", study.trees(_beside(scores, alike), columns))
    if options.minilm is not None:
        _minilm_rows(study, data, options.minilm)


def _linear(parts: tuple[Examples, Examples, Examples], lexical: Columns, recipe: Recipe) -> Columns:
    train = parts[0]
    mean = lexical[0][train.first].mean(axis=0)
    scale = np.maximum(lexical[0][train.first].std(axis=0), 1e-6)
    idf = inverse_document_frequency(train.features)
    with TemporaryDirectory() as workshop:
        linear, unseen = linear_stage(train, idf, mean, scale, recipe, Path(workshop), lambda share: None)
    return unseen, linear.scores(parts[1].features, lexical[1]), linear.scores(parts[2].features, lexical[2])


def _read_ranks(rank: Columns, length: Floats, groups: int = 20) -> tuple[Floats, Floats]:
    """Tokens at each rank, by the medians of groups of training rows that the ridge has not seen."""
    cut = np.array_split(np.argsort(rank[0]), groups)
    knots = np.array([rank[0][rows].mean() for rows in cut])
    medians = np.maximum.accumulate(np.array([np.median(length[rows]) for rows in cut]))
    # The rank itself breaks ties where the curve is flat.
    a, b = (np.interp(part, knots, medians) + 1e-6 * part for part in rank[1:])
    return a, b


def _beside(*columns: Columns) -> Columns:
    a, b, c = (np.hstack([group[part] for group in columns]) for part in range(3))
    return a, b, c


def _minilm_rows(study: Study, data: Dataset, folder: Path) -> None:
    train, opening = study.parts[0], study.parts[0].first
    length, fold = train.length[opening], folds_by_group(train.group, Recipe())[opening]
    rows = (data.split.train, data.split.validation, data.split.test)
    a, b, c = (_embedded(data.prompts(part), folder) for part in rows)
    design = [np.column_stack([part, np.ones(len(part))]) for part in (a, b, c)]

    def solve(seen: NDArray[np.bool_]) -> Floats:
        some, target = design[0][seen], mid_ranks(length, among=length)[seen]
        return np.asarray(
            np.linalg.solve(some.T @ some + 3.0 * np.eye(some.shape[1]), some.T @ target), dtype=np.float64
        )

    unseen = np.zeros(len(length))
    for part in range(Recipe().folds):
        unseen[fold == part] = design[0][fold == part] @ solve(fold != part)
    whole = solve(np.ones(len(length), dtype=np.bool_))
    rank = (unseen, design[1] @ whole, design[2] @ whole)
    study.row("MiniLM, ridge on rank", _read_ranks(rank, length))
    # Opening turns stand first in the training part; the others are not embedded, and not fitted to.
    everyone = np.zeros((len(train.length), a.shape[1] + 1))
    everyone[opening] = np.column_stack([a, unseen])
    embedding = (everyone, np.column_stack([b, rank[1]]), np.column_stack([c, rank[2]]))
    study.row("trees on MiniLM and measures", study.trees(embedding, study.lexical, opening))
    study.row("shipped recipe and MiniLM", study.trees(_beside(study.scores, embedding), study.lexical, opening))


def _embedded(prompts: list[str], folder: Path) -> Floats:
    """The mean of MiniLM's last hidden states; shape (prompts, 384)."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    order = sorted(range(len(prompts)), key=lambda at: len(prompts[at]))
    embedded = np.zeros((len(prompts), model.config.hidden_size))
    with torch.inference_mode():
        for first in range(0, len(order), 32):
            some = order[first : first + 32]
            read = tokenizer(
                [prompts[at] for at in some],
                truncation=True,
                max_length=PROMPT_TOKENS,
                padding=True,
                return_tensors="pt",
            )
            mask = read["attention_mask"][..., None]
            states = model(**read).last_hidden_state
            embedded[some] = ((states * mask).sum(dim=1) / mask.sum(dim=1)).numpy()
    return embedded


if __name__ == "__main__":
    main()
