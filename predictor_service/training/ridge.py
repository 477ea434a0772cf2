"""Ridge regression on sparse rows, for several targets at once, by preconditioned conjugate gradients.

    minimise  sum_i v_i (y_i - x_i w)^2  +  sum_j penalty_j w_j^2,     so   (X' V X + diag(penalty)) w = X' V y

X'X is never formed. Needs scipy, which the extra 'train' installs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def fit_ridge(
    design: Any,
    targets: Floats,
    row_weights: Floats,
    penalty: Floats,
    *,
    max_iterations: int = 60,
    tolerance: float = 1e-4,
    progress: Callable[[int], None] = lambda iteration: None,
) -> Floats:
    """Return the weights w, shape (width, targets).

    Args:
        design: X, a scipy CSR matrix of shape (rows, width).
        targets: y, shape (rows, targets).
        row_weights: v, shape (rows,).
        penalty: shape (width,).
        max_iterations: upper bound on iterations.
        tolerance: stop when the residual of every target is at most this share of its start.
        progress: called with the number of each iteration.
    """
    transposed = design.T.tocsr()
    squared = transposed.copy()
    squared.data = squared.data**2
    diagonal = np.asarray(squared @ row_weights, dtype=np.float64) + penalty
    diagonal[diagonal <= 0] = 1.0
    weights = np.zeros((len(penalty), targets.shape[1]))
    residual = np.asarray(transposed @ (row_weights[:, None] * targets), dtype=np.float64)
    step = residual / diagonal[:, None]
    energy = (residual * step).sum(axis=0)
    goal = tolerance**2 * energy
    for iteration in range(max_iterations):
        if (energy <= goal).all():
            break
        image = transposed @ (row_weights[:, None] * (design @ step)) + penalty[:, None] * step
        # `_ratio` is 0 for a target that is solved exactly.
        length = _ratio(energy, (step * image).sum(axis=0))
        weights += length * step
        residual -= length * image
        scaled = residual / diagonal[:, None]
        previous, energy = energy, (residual * scaled).sum(axis=0)
        step = scaled + _ratio(energy, previous) * step
        progress(iteration + 1)
    return weights


def _ratio(upper: Floats, lower: Floats) -> Floats:
    return np.divide(upper, lower, out=np.zeros_like(upper), where=lower > 0)
