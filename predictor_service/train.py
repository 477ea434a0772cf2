"""Fitting the length model: rank target, ridge, then calibration on conversations that the fit has not seen.

The target is the answer's mid-rank among the opening answers,

    r(y) = (#{y_i < y} + #{y_i <= y}) / (2 n),

so that one 20,000-token answer weighs no more than it should, and an answer that was cut off at the output
limit is simply among the longest: for ranking, "at least 767" is all there is to know. The tokens come back
through `predictor_service.calibration`, which treats those answers as right-censored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from predictor_service.calibration import Calibration, fit_calibration
from predictor_service.features import BUCKETS, LEXICAL_SIZE, WORD_BUCKETS, Features
from predictor_service.length_model import Card, LengthModel, standardised
from predictor_service.ridge import RowBlock, fit_ridge

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]

_BLOCK_ROWS = 2048


@dataclass(slots=True, frozen=True)
class Recipe:
    """What was chosen on the validation split.

    ``penalty`` is ridge's; ``later_weight`` what a turn further into a conversation weighs beside an opening
    one (1); ``lexical_gain`` scales the lexical columns, which loosens the penalty on them.
    """

    penalty: float = 3.0
    later_weight: float = 0.1
    lexical_gain: float = 0.1
    calibration_groups: int = 8
    max_iterations: int = 60


@dataclass(slots=True, frozen=True)
class Examples:
    """Prompts as features with their answers' lengths (tokens), whether those were cut off, and who opens."""

    features: Sequence[Features]
    length: Floats
    censored: Flags
    first: Flags

    def rows(self, which: NDArray[np.int64]) -> Examples:
        """The examples at these places."""
        picked = [self.features[row] for row in which]
        return Examples(picked, self.length[which], self.censored[which], self.first[which])


def fit_length_model(
    train: Examples,
    validation: Examples,
    card: Card,
    recipe: Recipe | None = None,
    progress: Callable[[int], None] = lambda iteration: None,
) -> LengthModel:
    """Fit on ``train`` and calibrate on ``validation``, which must share no conversation. Deterministic.

    ``progress`` is called with the number of solver iterations done. Raises ValueError when there is too
    little data.
    """
    recipe = recipe or Recipe()
    if not train.first.any():
        raise ValueError("training needs at least one conversation's opening turn")
    idf = inverse_document_frequency(train.features)
    lexical = np.array([row.lexical for row in train.features], dtype=np.float64)
    mean = lexical[train.first].mean(axis=0)
    scale = np.maximum(lexical[train.first].std(axis=0), 1e-6)
    # Dense columns: lexical measures, "not the opening turn" (0 when served), intercept.
    dense = np.column_stack(
        [standardised(lexical, mean, scale) * recipe.lexical_gain, ~train.first, np.ones(len(train.first))]
    )
    penalty = np.full(BUCKETS + dense.shape[1], recipe.penalty)
    penalty[-1] = 0.0
    weights = fit_ridge(
        design_blocks(train.features, idf, dense),
        target=mid_ranks(train.length, among=train.length[train.first]),
        row_weights=np.where(train.first, 1.0, recipe.later_weight),
        penalty=penalty,
        max_iterations=recipe.max_iterations,
        progress=progress,
    )
    nothing = Calibration(np.zeros(1), np.ones(1), np.ones(1))
    # Through float16 before calibrating: what is calibrated is what is stored.
    uncalibrated = LengthModel(
        idf=idf.astype(np.float16).astype(np.float32),
        weight=weights[:BUCKETS].astype(np.float16).astype(np.float32),
        lexical_mean=mean,
        lexical_scale=scale,
        lexical_weight=weights[BUCKETS : BUCKETS + LEXICAL_SIZE] * recipe.lexical_gain,
        intercept=float(weights[-1]),
        calibration=nothing,
        card=card,
    )
    calibration = fit_calibration(
        uncalibrated.score(validation.features),
        validation.length,
        validation.censored,
        recipe.calibration_groups,
    )
    return LengthModel(
        idf=uncalibrated.idf,
        weight=uncalibrated.weight,
        lexical_mean=mean,
        lexical_scale=scale,
        lexical_weight=uncalibrated.lexical_weight,
        intercept=uncalibrated.intercept,
        calibration=calibration,
        card=card,
    )


def mid_ranks(length: Floats, among: Floats) -> Floats:
    """r(y) of each of ``length`` (shape (rows,)) among the lengths ``among``; between 0 and 1."""
    ordered = np.sort(among)
    below, not_above = np.searchsorted(ordered, length, "left"), np.searchsorted(ordered, length, "right")
    return np.asarray((below + not_above) / (2.0 * len(ordered)), dtype=np.float64)


def inverse_document_frequency(rows: Sequence[Features]) -> NDArray[np.float32]:
    """idf_j = ln((1 + n) / (1 + prompts with bucket j)) + 1; shape (BUCKETS,)."""
    seen = np.zeros(BUCKETS)
    for row in rows:
        seen[row.indices] += 1.0
    return (np.log((1.0 + len(rows)) / (1.0 + seen)) + 1.0).astype(np.float32)


def design_blocks(rows: Sequence[Features], idf: NDArray[np.float32], dense: Floats) -> list[RowBlock]:
    """The design whose product with the weights is the score of `LengthModel`, a few thousand rows a
    block."""
    blocks = []
    for first in range(0, len(rows), _BLOCK_ROWS):
        some = rows[first : first + _BLOCK_ROWS]
        values = []
        for row in some:
            raw = (1.0 + np.log(row.counts.astype(np.float32))) * idf[row.indices]
            cut = int(np.searchsorted(row.indices, WORD_BUCKETS))
            for block in (slice(0, cut), slice(cut, None)):
                raw[block] /= float(np.sqrt(raw[block] @ raw[block])) or 1.0
            values.append(raw)
        blocks.append(
            RowBlock(
                columns=np.concatenate([row.indices for row in some]).astype(np.int64),
                values=np.concatenate(values).astype(np.float32),
                starts=np.cumsum([0, *(len(row.indices) for row in some)]),
                dense=dense[first : first + _BLOCK_ROWS],
            )
        )
    return blocks
