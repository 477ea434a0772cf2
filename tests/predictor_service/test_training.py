import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from predictor_service import cli
from predictor_service.model.features import FEATURES_VERSION, prompt_features
from predictor_service.model.length_model import LengthModel, load_model
from predictor_service.model.quantiles import censored_quantile, fit_calibration
from predictor_service.training import run as training_run
from predictor_service.training.evaluate import quality
from predictor_service.training.fit import Examples, Recipe, fit_length_model, mid_ranks
from predictor_service.training.ridge import fit_ridge
from predictor_service.training.sharegpt import Turn, groups_by_opening, split_by_conversation, user_turns
from tests.fixtures.length_data import collected_line, write_jsonl

CARD = {"model": "synthetic", "features_version": FEATURES_VERSION}
SMALL = Recipe(folds=2, levels=(0.25, 0.5, 0.75), trees=60, tree_rate=0.1, tree_least_rows=10, ridge_iterations=10)


def synthetic(rows: int, seed: int) -> Examples:
    """Return synthetic prompts whose verb determines the length of the answer, up to log-normal noise."""
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
        np.arange(rows),
    )


def fit(train: int, validation: int, folder: Path, progress=lambda share: None) -> LengthModel:
    return fit_length_model(synthetic(train, 1), synthetic(validation, 2), CARD, SMALL, folder, progress)


@pytest.mark.usefixtures("lightgbm")
def test_fit_length_model_is_accurate_and_calibrated(tmp_path):
    model = fit(600, 300, tmp_path)
    test = synthetic(300, 3)
    predicted = model.predict(test.features)
    metrics = quality(predicted, test.length, test.censored, reference=synthetic(600, 1).length)
    assert metrics["kendall_tau"] > 0.6
    assert metrics["mae_tokens"] < 0.5 * metrics["mae_constant"]
    assert 0.84 <= metrics["coverage_p90_strict"] <= metrics["coverage_p90"] <= 0.97
    assert metrics["accuracy"] <= metrics["off_by_1"] <= metrics["off_by_2"]
    model.save(tmp_path)
    assert load_model(tmp_path).predict(test.features) == predicted


@pytest.mark.usefixtures("lightgbm")
def test_resumed_training_gives_same_model(tmp_path):
    whole = fit(200, 100, tmp_path / "whole")

    def stop_half_way(share: float) -> None:
        if share > 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(200, 100, tmp_path / "interrupted", stop_half_way)
    shares: list[float] = []
    resumed = fit(200, 100, tmp_path / "interrupted", shares.append)
    assert shares[0] > 0.45
    prompts = synthetic(50, 4).features
    assert resumed.predict(prompts) == whole.predict(prompts)


def test_fit_length_model_rejects_small_validation_part(tmp_path):
    with pytest.raises(ValueError, match="at least 20"):
        fit(50, 5, tmp_path)


def test_fit_ridge_solves_normal_equations():
    sparse = pytest.importorskip("scipy.sparse")
    rng = np.random.default_rng(7)
    design = rng.normal(size=(60, 14))
    targets, weight = rng.normal(size=(60, 3)), rng.uniform(0.5, 2, 60)
    targets[:, 2] = 0.0
    penalty = np.linspace(0.0, 2.0, 14)
    exact = np.linalg.solve(
        design.T @ (weight[:, None] * design) + np.diag(penalty), design.T @ (weight[:, None] * targets)
    )
    fitted = fit_ridge(sparse.csr_matrix(design), targets, weight, penalty, tolerance=1e-10)
    assert fitted == pytest.approx(exact, abs=1e-5)


def test_censored_quantile_treats_truncated_lengths_as_lower_bounds():
    lengths = np.array([10.0, 20, 30, 40, 50, 60, 70, 80, 90, 100])
    complete = np.zeros(10, bool)
    assert censored_quantile(lengths, complete, 0.5) == 50.0
    assert censored_quantile(lengths, complete, 0.9) == 90.0
    truncated = np.minimum(lengths, 75.0)
    assert censored_quantile(truncated, lengths > 75, 0.5) == 50.0
    assert censored_quantile(truncated, lengths > 75, 0.9) > 75.0
    assert censored_quantile(np.full(5, 767.0), np.ones(5, bool), 0.9) == 767.0


def test_calibration_covers_nine_in_ten_at_every_estimate():
    rng = np.random.default_rng(3)
    estimate = rng.uniform(20, 500, 6000)
    length = np.round(2 * estimate * np.exp(rng.normal(0, 1.0 - estimate / 1000))) + 1
    held_out, rest = slice(0, 3000), slice(3000, 6000)
    curve = fit_calibration(estimate[held_out], length[held_out], np.zeros(3000, bool))
    p50, p90 = curve.quantiles(estimate[rest])
    assert np.mean(length[rest] <= p50) == pytest.approx(0.5, abs=0.03)
    for part in (estimate[rest] < 150, estimate[rest] > 350):
        assert np.mean(length[rest][part] <= p90[part]) == pytest.approx(0.9, abs=0.03)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=20))
def test_calibrated_quantiles_are_ordered_and_at_least_one_token(estimates):
    rng = np.random.default_rng(0)
    curve = fit_calibration(rng.uniform(1, 400, 200), rng.exponential(200, 200), np.zeros(200, bool))
    p50, p90 = curve.quantiles(np.array(estimates))
    assert (p50 >= 1.0).all()
    assert (p90 >= p50).all()


def test_fit_calibration_accepts_constant_estimate():
    curve = fit_calibration(np.ones(100), np.arange(100.0), np.zeros(100, bool))
    assert len(curve.estimate) == 1


def test_mid_ranks_of_ties_and_outliers():
    ranks = mid_ranks(np.array([1.0, 5, 5, 900]), among=np.array([1.0, 5, 5, 900]))
    assert ranks.tolist() == [0.125, 0.5, 0.5, 0.875]
    assert mid_ranks(np.array([9e9]), among=np.array([1.0, 2])) == [1.0]


def conversation(name: str, *texts: str) -> dict[str, object]:
    turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
    return {"id": name, "conversations": turns}


def test_user_turns_reads_truncated_dataset():
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


def test_split_shares_no_conversation_and_no_prompt():
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


def test_groups_by_opening_joins_equal_openings():
    turns = [
        Turn("a", True, "Hello there", 1, False),
        Turn("a", False, "more", 1, False),
        Turn("b", True, "hello  THERE", 1, False),
        Turn("b", False, "less", 1, False),
        Turn("c", True, "other", 1, False),
        Turn("d", False, "no opening", 1, False),
        Turn("d", False, "nor here", 1, False),
    ]
    a, a2, b, b2, c, d, d2 = groups_by_opening(turns).tolist()
    assert a == a2 == b == b2
    assert d == d2
    assert len({a, c, d}) == 3


@pytest.mark.usefixtures("lightgbm")
def test_commands_train_and_evaluate_on_collected_data(tmp_path, monkeypatch):
    monkeypatch.setattr(training_run, "Recipe", lambda seed: replace(SMALL, seed=seed))
    answers = synthetic(500, 8)
    rows = zip(answers.features, answers.length, answers.censored, strict=True)
    lines = [collected_line(row, int(length), censored=bool(censored)) for row, length, censored in rows]
    data, folder = write_jsonl(tmp_path / "lengths.jsonl", lines), tmp_path / "model"
    trained = CliRunner().invoke(cli.app, ["train", "--data", str(data), "--output", str(folder), "--json"])
    assert trained.exit_code == 0, trained.output
    card_metrics = json.loads(trained.stdout)["metrics"]["test"]
    evaluate = ["evaluate", "--model", str(folder), "--json"]
    measured = CliRunner().invoke(cli.app, [*evaluate, "--data", str(data)])
    assert measured.exit_code == 0, measured.output
    assert json.loads(measured.stdout)["mae_tokens"] == pytest.approx(card_metrics["mae_tokens"], abs=0.01)
    without_data = CliRunner().invoke(cli.app, evaluate)
    assert without_data.exit_code == 1
    assert "--data" in without_data.output
