import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from predictor_service.model.trees import Trees, from_lightgbm


def leaf(value):
    return {"leaf_value": value}


def split(column, threshold, below, above):
    return {"split_feature": column, "threshold": threshold, "left_child": below, "right_child": above}


DUMP = {
    "tree_info": [
        {"tree_structure": split(0, 0.5, leaf(1.0), split(1, -2.0, leaf(10.0), leaf(20.0)))},
        {"tree_structure": leaf(0.25)},
        {"tree_structure": split(1, 0.0, leaf(-1.0), leaf(-2.0))},
    ]
}


def by_hand(a, b):
    return (1.0 if a <= 0.5 else 10.0 if b <= -2.0 else 20.0) + 0.25 + (-1.0 if b <= 0.0 else -2.0)


@given(st.lists(st.tuples(st.floats(-5, 5, width=32), st.floats(-5, 5, width=32)), min_size=1, max_size=20))
def test_trees_predict_matches_hand_evaluation(points):
    trees = from_lightgbm(DUMP)
    assert trees.depth == 2
    assert trees.predict(np.array(points, np.float32)).tolist() == [by_hand(a, b) for a, b in points]


def test_trees_check_rejects_inconsistent_arrays():
    trees = from_lightgbm(DUMP)
    trees.check(columns=2)
    with pytest.raises(ValueError, match="inconsistent"):
        trees.check(columns=1)
    fields = {name: getattr(trees, name) for name in ("roots", "column", "threshold", "below", "above", "value")}
    for broken in ({"below": trees.below + 100}, {"roots": trees.roots - 1}, {"value": trees.value[:-1]}):
        with pytest.raises(ValueError, match="inconsistent"):
            Trees(**(fields | broken), depth=2).check(columns=2)
    with pytest.raises(ValueError, match="inconsistent"):
        Trees(**fields, depth=1000).check(columns=2)


def test_trees_predict_matches_lightgbm(lightgbm):
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(400, 5)).astype(np.float32)
    target = np.where(rows[:, 0] > 0, rows[:, 1], 3 * rows[:, 2])
    options = {"objective": "regression_l1", "num_leaves": 8, "verbosity": -1, "num_threads": 1}
    booster = lightgbm.train(options, lightgbm.Dataset(rows, target), 20)
    assert from_lightgbm(booster.dump_model()).predict(rows) == pytest.approx(booster.predict(rows), abs=1e-4)
