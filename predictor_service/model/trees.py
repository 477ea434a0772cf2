"""An ensemble of regression trees as flat arrays. numpy evaluates all trees and all rows one level at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

FIELDS = ("roots", "column", "threshold", "below", "above", "value")


@dataclass(slots=True, frozen=True)
class Trees:
    """Node n leads to ``below``[n] if x[``column``[n]] <= ``threshold``[n], else to ``above``[n].

    A leaf leads to itself and has the value ``value``[n]. ``roots``: shape (trees,); the others: shape (nodes,).
    ``depth``: number of splits on the longest path.
    """

    roots: NDArray[np.int32]
    column: NDArray[np.int32]
    threshold: NDArray[np.float32]
    below: NDArray[np.int32]
    above: NDArray[np.int32]
    value: NDArray[np.float32]
    depth: int

    def predict(self, rows: NDArray[np.float32]) -> Floats:
        """Return the sum of the leaf values over all trees, shape (rows,), for ``rows`` of shape (rows, columns)."""
        at: NDArray[np.int32] = np.broadcast_to(self.roots, (len(rows), len(self.roots)))
        flat, row = rows.ravel(), (np.arange(len(rows)) * rows.shape[1])[:, None]
        for _ in range(self.depth):  # `take` on flat arrays takes half the time of indexing in two dimensions
            tested = flat.take(row + self.column.take(at))
            at = np.where(tested <= self.threshold.take(at), self.below.take(at), self.above.take(at))
        return np.asarray(self.value.take(at).sum(axis=1, dtype=np.float64), dtype=np.float64)

    def check(self, columns: int) -> None:
        """Check that these arrays describe trees over ``columns`` input columns.

        Raises:
            ValueError: they do not.
        """
        nodes = len(self.column)
        same = all(len(array) == nodes for array in (self.threshold, self.below, self.above, self.value))
        inside = all(
            array.size and array.min() >= 0 and array.max() < limit
            for array, limit in ((self.roots, nodes), (self.below, nodes), (self.above, nodes), (self.column, columns))
        )
        if not same or not inside or not 0 <= self.depth <= 64:
            raise ValueError("the tree arrays are inconsistent")


def from_lightgbm(dump: dict[str, Any]) -> Trees:
    """Return the trees of ``lightgbm.Booster.dump_model()``; numerical splits only, no missing values."""
    roots: list[int] = []
    nodes: list[list[float]] = []  # column, threshold, below, above, value

    def add(node: dict[str, Any], depth: int) -> tuple[int, int]:
        """Append ``node`` and its children; return its index and the depth of its deepest leaf."""
        node_id = len(nodes)
        nodes.append([0, 0.0, node_id, node_id, float(node.get("leaf_value", 0.0))])
        if "split_feature" not in node:
            return node_id, depth
        (below, a), (above, b) = (add(node[child], depth + 1) for child in ("left_child", "right_child"))
        nodes[node_id] = [node["split_feature"], node["threshold"], below, above, 0.0]
        return node_id, max(a, b)

    deepest = 0
    for tree in dump["tree_info"]:
        root, depth = add(tree["tree_structure"], 0)
        roots.append(root)
        deepest = max(deepest, depth)
    column, threshold, below, above, value = (np.array(field) for field in zip(*nodes, strict=True))
    return Trees(
        roots=np.array(roots, dtype=np.int32),
        column=column.astype(np.int32),
        threshold=threshold.astype(np.float32),
        below=below.astype(np.int32),
        above=above.astype(np.int32),
        value=value.astype(np.float32),
        depth=deepest,
    )
