"""Ridge regression over sparse rows, by preconditioned conjugate gradients, in numpy alone.

    minimise  sum_i v_i (y_i - x_i w)^2  +  sum_j penalty_j w_j^2,     so   (X' V X + diag(penalty)) w = X' V
    y

Rows come in blocks, which bounds the memory of the products and never forms X'X.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(slots=True, frozen=True)
class RowBlock:
    """Some consecutive rows of the design: a sparse part and a dense part side by side.

    ``columns`` and ``values``: shape (stored,); ``starts``: shape (rows + 1,), row r's entries are
    ``starts[r]:starts[r + 1]``. ``dense``: shape (rows, d). Weights are the sparse columns' first, then the
    dense ones'.
    """

    columns: NDArray[np.int64]
    values: NDArray[np.float32]
    starts: NDArray[np.int64]
    dense: Floats

    def times(self, weights: Floats) -> Floats:
        """X w for these rows; shape (rows,)."""
        sparse = weights[: len(weights) - self.dense.shape[1]]
        running = np.concatenate([[0.0], np.cumsum(self.values * sparse[self.columns])])
        sums = running[self.starts[1:]] - running[self.starts[:-1]]
        return np.asarray(sums + self.dense @ weights[len(sparse) :], dtype=np.float64)

    def transposed_times(self, residual: Floats, width: int, power: int = 1) -> Floats:
        """(X ** power)' r for these rows; shape (width,)."""
        spread = np.repeat(residual, np.diff(self.starts)) * self.values.astype(np.float64) ** power
        sparse = np.bincount(self.columns, weights=spread, minlength=width - self.dense.shape[1])
        return np.concatenate([sparse, (self.dense**power).T @ residual])


def fit_ridge(
    blocks: Sequence[RowBlock],
    target: Floats,
    row_weights: Floats,
    penalty: Floats,
    *,
    max_iterations: int = 60,
    tolerance: float = 1e-4,
    progress: Callable[[int], None] = lambda iteration: None,
) -> Floats:
    """The weights, shape (width,), from ``target`` and ``row_weights`` (shape (rows,)) and ``penalty`` (shape
    (width,)).

    Stops when the residual has shrunk to ``tolerance`` of its start, or after ``max_iterations``.
    """
    width = len(penalty)
    cuts = np.cumsum([0, *(len(block.starts) - 1 for block in blocks)])
    pieces = [slice(first, last) for first, last in pairwise(cuts)]

    def gather(rows: Floats, power: int = 1) -> Floats:
        total = np.zeros(width)
        for block, piece in zip(blocks, pieces, strict=True):
            total += block.transposed_times(rows[piece], width, power)
        return total

    def normal(weights: Floats) -> Floats:
        total = penalty * weights
        for block, piece in zip(blocks, pieces, strict=True):
            total += block.transposed_times(row_weights[piece] * block.times(weights), width)
        return total

    diagonal = gather(row_weights, power=2) + penalty
    diagonal[diagonal <= 0] = 1.0
    weights = np.zeros(width)
    residual = gather(row_weights * target)
    step = residual / diagonal
    energy = float(residual @ step)
    goal = tolerance**2 * energy
    for iteration in range(max_iterations):
        if energy <= goal or energy == 0.0:
            break
        image = normal(step)
        length = energy / float(step @ image)
        weights += length * step
        residual -= length * image
        scaled = residual / diagonal
        previous, energy = energy, float(residual @ scaled)
        step = scaled + (energy / previous) * step
        progress(iteration + 1)
    return weights
