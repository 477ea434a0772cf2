import json

import numpy as np
import pytest

from predictor_service.calibration import censored_quantile, fit_calibration
from predictor_service.evaluate import quality
from predictor_service.features import FEATURES_VERSION, prompt_features
from predictor_service.length_model import load_model
from predictor_service.ridge import RowBlock, fit_ridge
from predictor_service.sharegpt import Turn, split_by_conversation, user_turns
from predictor_service.train import Examples, fit_length_model, mid_ranks

CARD = {"model": "synthetic", "features_version": FEATURES_VERSION}
RNG = np.random.default_rng(7)


def synthetic(rows: int, seed: int) -> Examples:
    """Made-up prompts whose verb decides how long the answer is, up to log-normal noise."""
    rng = np.random.default_rng(seed)
    typical = {"define": 30, "translate": 80, "explain": 250, "draft an essay on": 600}
    subjects = ["tides", "bridges", "moss", "copper", "violins", "granite", "kites"]
    verbs = rng.choice(list(typical), rows)
    prompts = [f"please {verb} {rng.choice(subjects)} and {rng.choice(subjects)}" for verb in verbs]
    length = np.array([typical[verb] for verb in verbs]) * np.exp(rng.normal(0, 0.3, rows))
    censored = length > 767
    return Examples(
        [prompt_features(prompt) for prompt in prompts],
        np.where(censored, 767.0, np.round(length)),
        censored,
        np.ones(rows, bool),
    )


def test_training_finds_what_decides_the_length_and_calibrates_it(tmp_path):
    model = fit_length_model(synthetic(600, 1), synthetic(300, 2), CARD)
    test = synthetic(300, 3)
    metrics = quality(model, test, reference=synthetic(600, 1).length)
    assert metrics["kendall_tau"] > 0.6
    assert metrics["mae_tokens"] < 0.5 * metrics["mae_constant"]
    assert 0.84 <= metrics["coverage_p90_strict"] <= metrics["coverage_p90"] <= 0.97
    model.save(tmp_path)
    assert load_model(tmp_path).predict(test.features) == model.predict(test.features)


def test_training_is_deterministic():
    a, b = (fit_length_model(synthetic(200, 1), synthetic(100, 2), CARD) for _ in range(2))
    assert (a.weight == b.weight).all()
    assert (a.calibration.p90 == b.calibration.p90).all()


def test_training_with_too_little_to_calibrate_on_says_so():
    with pytest.raises(ValueError, match="at least 20"):
        fit_length_model(synthetic(50, 1), synthetic(5, 2), CARD)


def test_ridge_solves_the_normal_equations():
    rows, sparse, dense = 60, 12, 2
    design = RNG.normal(size=(rows, sparse + dense))
    blocks = [
        RowBlock(
            columns=np.tile(np.arange(sparse), stop - start),
            values=design[start:stop, :sparse].astype(np.float32).ravel(),
            starts=np.arange(0, sparse * (stop - start) + 1, sparse),
            dense=design[start:stop, sparse:],
        )
        for start, stop in ((0, 25), (25, 60))
    ]
    target, weight = RNG.normal(size=rows), RNG.uniform(0.5, 2, rows)
    penalty = np.linspace(0.0, 2.0, sparse + dense)
    exact = np.linalg.solve(design.T @ (weight[:, None] * design) + np.diag(penalty), design.T @ (weight * target))
    assert fit_ridge(blocks, target, weight, penalty, tolerance=1e-10) == pytest.approx(exact, abs=1e-5)


def test_a_quantile_reads_cut_off_answers_as_at_least_that_long():
    lengths = np.array([10.0, 20, 30, 40, 50, 60, 70, 80, 90, 100])
    nobody = np.zeros(10, bool)
    assert censored_quantile(lengths, nobody, 0.5) == 50.0
    assert censored_quantile(lengths, nobody, 0.9) == 90.0
    cut = np.minimum(lengths, 75.0)
    assert censored_quantile(cut, lengths > 75, 0.5) == 50.0
    assert censored_quantile(cut, lengths > 75, 0.9) > 75.0
    assert censored_quantile(np.full(5, 767.0), np.ones(5, bool), 0.9) == 767.0


def test_calibrated_quantiles_never_fall_as_the_score_rises():
    score = RNG.uniform(size=400)
    curve = fit_calibration(score, RNG.exponential(200, 400), np.zeros(400, bool))
    assert (np.diff(curve.score) > 0).all()
    assert (np.diff(curve.p50) >= 0).all()
    assert (np.diff(curve.p90) >= 0).all()
    assert (curve.p50 <= curve.p90).all()


def test_a_constant_score_still_calibrates():
    curve = fit_calibration(np.ones(100), np.arange(100.0), np.zeros(100, bool))
    assert len(curve.score) == 1


def test_ranks_are_midway_among_ties_and_ignore_how_long_the_longest_is():
    ranks = mid_ranks(np.array([1.0, 5, 5, 900]), among=np.array([1.0, 5, 5, 900]))
    assert ranks.tolist() == [0.125, 0.5, 0.5, 0.875]
    assert mid_ranks(np.array([9e9]), among=np.array([1.0, 2])) == [1.0]


def conversation(name: str, *texts: str) -> dict[str, object]:
    turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
    return {"id": name, "conversations": turns}


def test_sharegpt_is_read_up_to_where_it_is_cut_off():
    whole = json.dumps(
        [
            conversation("a_0", "q1", "r1", "q2", "r2"),
            conversation("a_2", "q3", "r3"),
            conversation("b_0", " ", "r"),
            conversation("c_0", "only a question"),
            {"id": "d_0", "conversations": [{"from": "gpt", "value": "x"}, {"from": "human", "value": "y"}]},
            conversation("e_0", "lost", "in the cut"),
        ]
    )
    read = [turn[:4] for turn in user_turns(whole[:-15])]
    assert read == [("a", True, "q1", "r1"), ("a", False, "q2", "r2"), ("a", False, "q3", "r3")]


def test_the_split_shares_no_conversation_and_no_prompt_and_follows_the_seed():
    turns = []
    for n in range(400):
        turns += [
            Turn(f"c{n}", True, f"Opening {n // 2}", 10, False),
            Turn(f"c{n}", False, f"later {n}", 10, False),
            Turn(f"c{n}", False, f"opening  {(n * 7) % 200}", 10, False),
        ]
    split = split_by_conversation(turns, seed=3)
    parts = {name: [turns[row] for row in getattr(split, name)] for name in ("train", "validation", "test", "later")}
    opened = {name: {t.prompt for t in parts[name]} for name in ("train", "validation", "test")}
    assert not opened["train"] & (opened["validation"] | opened["test"])
    assert not opened["validation"] & opened["test"]
    held_out = parts["validation"] + parts["test"]
    assert not {t.conversation for t in parts["later"]} & {t.conversation for t in held_out}
    repeated = {" ".join(t.prompt.lower().split()) for t in parts["later"]}
    assert not repeated & {t.prompt.lower() for t in held_out}
    assert sum(len(parts[name]) for name in ("train", "validation", "test")) == 400
    assert (split_by_conversation(turns, seed=3).test == split.test).all()
    assert not np.array_equal(split_by_conversation(turns, seed=4).test, split.test)
