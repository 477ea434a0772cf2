"""Fits the CPU length model in three stages: linear scores, boosted trees, calibration.

*Stage 1*: ridge regression on hashed n-grams gives several linear scores of the output length y. The first one is its
mid-rank among the opening turns,

    r(y) = (#{y_i < y} + #{y_i <= y}) / (2 n).

A rank limits the weight of a 20,000-token answer, and needs no correction for truncated answers, which rank among the
longest. The other scores are ln y, and [y > q] for the quantiles q of the opening turns (`Recipe.levels`). Together
they say more about the distribution of y than the rank alone.

*Stage 2*: boosted trees on the scores and the lexical measures minimise the absolute error in tokens, so that their sum
estimates the median. Stage 1 overfits its own rows, so the trees are fitted to cross-fitted scores: each row is scored
by a ridge that has not seen it. Folds keep conversations together, and conversations with the same opening prompt.

*Stage 3*: `predictor_service.model.quantiles` turns the estimate into quantiles, fitted to the validation part.
Truncated answers are right-censored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from predictor_service.model.features import BUCKETS, WORD_BUCKETS, Features
from predictor_service.model.length_model import Card, LengthModel, Linear, standardised, tree_inputs
from predictor_service.model.lexical import LEXICAL_SIZE
from predictor_service.model.quantiles import Calibration, fit_calibration
from predictor_service.model.trees import Trees, from_lightgbm
from predictor_service.training.checkpoint import Checkpoint, Tensors, fingerprint
from predictor_service.training.ridge import fit_ridge

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]
Groups = NDArray[np.int64]


@dataclass(slots=True, frozen=True)
class Recipe:
    """Hyper-parameters, chosen on the validation part of ShareGPT. They are stored in the model card.

    ``penalty``: of the ridge. ``later_weight``: weight of a later turn; an opening turn has weight 1. ``lexical_gain``:
    factor on the lexical columns of the ridge, which changes their effective penalty. ``levels``: quantiles q of stage
    1. ``folds``: for cross-fitting. ``tree_*``: options of LightGBM. ``calibration_groups``: groups of stage 3.
    """

    penalty: float = 3.0
    later_weight: float = 0.1
    lexical_gain: float = 0.1
    levels: tuple[float, ...] = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
    folds: int = 5
    ridge_iterations: int = 25
    trees: int = 500
    tree_rate: float = 0.03
    tree_leaves: int = 15
    tree_least_rows: int = 40
    tree_columns: float = 0.5
    tree_rows: float = 0.7
    tree_penalty: float = 5.0
    calibration_groups: int = 8
    seed: int = 0


@dataclass(slots=True, frozen=True)
class Examples:
    """Prompts and their answers; every array has shape (rows,).

    ``length``: output length in tokens. ``censored``: True if the answer was truncated. ``first``: True if the turn
    opens a conversation. ``group``: the same number for rows that must stay in one fold.
    """

    features: Sequence[Features]
    length: Floats
    censored: Flags
    first: Flags
    group: Groups


def fit_length_model(
    train: Examples,
    validation: Examples,
    card: Card,
    recipe: Recipe,
    checkpoint_folder: Path,
    progress: Callable[[float], None] = lambda share: None,
) -> LengthModel:
    """Fit on ``train`` and calibrate on ``validation``, which must share no conversation.

    The same arguments give the same model, whether or not the run was interrupted and resumed.

    Raises:
        ValueError: there is too little data.
    """
    if not train.first.any():
        raise ValueError("training needs at least one conversation's opening turn")
    if len(validation.length) < 20:
        raise ValueError(f"calibration needs at least 20 held-out answers, got {len(validation.length)}")
    lexical = np.array([row.lexical for row in train.features], dtype=np.float64)
    mean = lexical[train.first].mean(axis=0)
    scale = np.maximum(lexical[train.first].std(axis=0), 1e-6)
    idf = inverse_document_frequency(train.features)
    linear, scores = linear_stage(
        train, idf, mean, scale, recipe, checkpoint_folder, lambda share: progress(0.75 * share)
    )
    trees = tree_stage(train, scores, lexical, recipe, lambda share: progress(0.75 + 0.25 * share))
    model = LengthModel(linear, trees, Calibration(np.ones(1), np.ones(1), np.ones(1)), card)
    calibration = fit_calibration(
        model.estimate(validation.features), validation.length, validation.censored, recipe.calibration_groups
    )
    return LengthModel(linear, trees, calibration, card)


def linear_stage(
    train: Examples,
    idf: NDArray[np.float32],
    mean: Floats,
    scale: Floats,
    recipe: Recipe,
    checkpoint_folder: Path,
    progress: Callable[[float], None],
) -> tuple[Linear, Floats]:
    """Run stage 1. Return the linear scores fitted to all rows, and the cross-fitted scores, shape (rows, targets)."""
    design = design_matrix(train, idf, mean, scale, recipe.lexical_gain)
    targets = _targets(train, recipe.levels)
    row_weights = np.where(train.first, 1.0, recipe.later_weight)
    penalty = np.full(design.shape[1], recipe.penalty)
    penalty[-1] = 0.0
    fold = folds_by_group(train.group, recipe)
    key = fingerprint(asdict(recipe), train.length, train.first, train.group, idf)
    checkpoint = Checkpoint(checkpoint_folder, key)
    tensors: Tensors = (checkpoint.load() or ({}, {}))[0]
    for part in range(recipe.folds + 1):  # the last fit uses all folds
        name = f"weights_{part}"
        if name in tensors:
            continue
        seen = fold != part

        def report(iteration: int, part: int = part) -> None:
            progress((part + iteration / recipe.ridge_iterations) / (recipe.folds + 1))

        weights = fit_ridge(
            design[seen],
            targets[seen],
            row_weights[seen],
            penalty,
            max_iterations=recipe.ridge_iterations,
            progress=report,
        )
        tensors = tensors | {name: weights.astype(np.float32)}
        checkpoint.save(tensors, {})
    scores = np.zeros(targets.shape)
    for part in range(recipe.folds):
        scores[fold == part] = design[fold == part] @ tensors[f"weights_{part}"]
    weights = tensors[f"weights_{recipe.folds}"].astype(np.float64)
    linear = Linear(
        # Rounded to float16 as on disk, so that the calibration fits the stored model.
        idf=idf.astype(np.float16).astype(np.float32),
        weight=weights[:BUCKETS].astype(np.float16).astype(np.float32),
        lexical_mean=mean,
        lexical_scale=scale,
        lexical_weight=weights[BUCKETS : BUCKETS + LEXICAL_SIZE] * recipe.lexical_gain,
        intercept=weights[-1],
    )
    return linear, scores


def tree_stage(
    train: Examples,
    scores: Floats,
    lexical: Floats,
    recipe: Recipe,
    progress: Callable[[float], None] = lambda share: None,
) -> Trees:
    """Run stage 2: fit trees to ``scores`` and ``lexical``, each with any number of columns."""
    import lightgbm

    options = {
        "objective": "regression_l1",
        "learning_rate": recipe.tree_rate,
        "num_leaves": recipe.tree_leaves,
        "min_data_in_leaf": recipe.tree_least_rows,
        "feature_fraction": recipe.tree_columns,
        "bagging_fraction": recipe.tree_rows,
        "bagging_freq": 1,
        "lambda_l2": recipe.tree_penalty,
        "seed": recipe.seed,
        "deterministic": True,
        "force_row_wise": True,
        "num_threads": 1,
        "verbosity": -1,
    }
    data = lightgbm.Dataset(
        tree_inputs(scores, lexical, ~train.first),
        train.length,
        weight=np.where(train.first, 1.0, recipe.later_weight),
    )
    callbacks = [lambda round_: progress((round_.iteration + 1) / recipe.trees)]
    return from_lightgbm(lightgbm.train(options, data, recipe.trees, callbacks=callbacks).dump_model())


def _targets(train: Examples, levels: Sequence[float]) -> Floats:
    opening = train.length[train.first]
    above = [train.length > bound for bound in np.quantile(opening, levels)]
    return np.column_stack([mid_ranks(train.length, among=opening), np.log(train.length), *above]).astype(np.float64)


def folds_by_group(group: Groups, recipe: Recipe) -> NDArray[np.int64]:
    """Return a fold for each row, the same for all rows of a group; shape (rows,), 0 to folds - 1."""
    groups, group_of_row = np.unique(group, return_inverse=True)
    return np.random.default_rng(recipe.seed).integers(0, recipe.folds, len(groups))[group_of_row]


def mid_ranks(length: Floats, among: Floats) -> Floats:
    """Return r(y) of each of ``length`` (shape (rows,)) among the lengths ``among``; 0 to 1."""
    ordered = np.sort(among)
    below, not_above = np.searchsorted(ordered, length, "left"), np.searchsorted(ordered, length, "right")
    return np.asarray((below + not_above) / (2.0 * len(ordered)), dtype=np.float64)


def inverse_document_frequency(rows: Sequence[Features]) -> NDArray[np.float32]:
    """Return idf_j = ln((1 + n) / (1 + prompts with bucket j)) + 1; shape (BUCKETS,)."""
    seen = np.zeros(BUCKETS)
    for row in rows:
        seen[row.indices] += 1.0
    return (np.log((1.0 + len(rows)) / (1.0 + seen)) + 1.0).astype(np.float32)


def design_matrix(train: Examples, idf: NDArray[np.float32], mean: Floats, scale: Floats, gain: float) -> Any:
    """Return the CSR matrix whose product with the weights gives the linear scores of `LengthModel`.

    Columns: the buckets, the lexical measures, 1 for a later turn (0 in serving), and a constant 1.
    """
    from scipy import sparse

    values = []
    for row in train.features:
        raw = (1.0 + np.log(row.counts.astype(np.float32))) * idf[row.indices]
        cut = int(np.searchsorted(row.indices, WORD_BUCKETS))
        for block in (slice(0, cut), slice(cut, None)):
            raw[block] /= float(np.sqrt(raw[block] @ raw[block])) or 1.0
        values.append(raw)
    starts = np.cumsum([0, *(len(row.indices) for row in train.features)])
    columns = np.concatenate([row.indices for row in train.features]).astype(np.int32)
    hashed = sparse.csr_matrix((np.concatenate(values), columns, starts), shape=(len(values), BUCKETS))
    lexical = np.array([row.lexical for row in train.features], dtype=np.float64)
    dense = np.column_stack([standardised(lexical, mean, scale) * gain, ~train.first, np.ones(len(values))])
    return sparse.hstack([hashed, sparse.csr_matrix(dense.astype(np.float32))]).tocsr()
