"""The paper's length model on CPU, end to end, with a tiny randomly initialised OPT: no download, a few seconds."""

import json

import numpy as np
import pytest
from starlette.testclient import TestClient
from typer.testing import CliRunner

from predictor_service import cli
from predictor_service.model.features import prompt_features
from predictor_service.model.length_model import CARD_FILE, ModelUnusable, load_model
from predictor_service.serving.app import create_app
from predictor_service.training import run as training_run
from tests.fixtures.length_data import write_jsonl
from tests.fixtures.untraced import untraced

WORDS = ["define", "translate", "explain", "draft", "tides", "moss", "copper", "kites", "please", "[PAD]", "[UNK]"]
TYPICAL = {"define": 30, "explain": 250, "draft": 600}


@pytest.fixture(scope="module", autouse=True)
def training():
    """`predictor_service.training.fit_classifier`.

    torch and transformers take seconds to import, so only the process that runs these tests imports them, and not when
    tests are collected. One thread, because more slow down such a small network.
    """
    with untraced():
        torch = pytest.importorskip("torch")
        transformers = pytest.importorskip("transformers")
        transformers.OPTModel  # noqa: B018 - transformers loads its parts on first access
        from predictor_service.training import fit_classifier
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield fit_classifier
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def base(training, tmp_path_factory):
    """A folder like one from Hugging Face: a one-layer OPT of width 32 and a word-level tokenizer."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("tiny-opt")
    torch.manual_seed(0)
    config = transformers.OPTConfig(
        vocab_size=len(WORDS), hidden_size=32, word_embed_proj_dim=16, ffn_dim=32, num_hidden_layers=1,
        num_attention_heads=4, max_position_embeddings=64, pad_token_id=9, bos_token_id=9, eos_token_id=9,
    )  # fmt: skip
    transformers.OPTModel(config).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({word: at for at, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]")
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def labelled(training):
    """A function that returns prompts whose verb determines the length of the answer, up to log-normal noise."""

    def make(rows: int, seed: int):
        rng = np.random.default_rng(seed)
        verbs = rng.choice(list(TYPICAL), rows)
        prompts = [f"please {verb} {' '.join(rng.choice(WORDS[4:8], rng.integers(1, 6)))}" for verb in verbs]
        length = np.array([TYPICAL[verb] for verb in verbs]) * np.exp(rng.normal(0, 0.2, rows))
        return training.Labelled(prompts, np.round(length))

    return make


@pytest.fixture(scope="module")
def fit(training, base, labelled):
    """A function that fine-tunes `base` on (train, validation) synthetic rows of the given seeds."""

    def run(train: tuple[int, int], validation: tuple[int, int], folder, progress=lambda share: None, **changes):
        options = {"bins": 20, "learning_rate": 3e-3, "batch": 32, "epochs": 8, "rows_at_once": 32} | changes
        recipe = training.ClassifierRecipe(base=str(base), **options)
        return training.fit_classifier(
            labelled(*train), labelled(*validation), recipe, {"model": "tiny"}, folder, progress
        )

    return run


@pytest.fixture(scope="module")
def trained(fit, tmp_path_factory):
    return fit((320, 1), (120, 2), tmp_path_factory.mktemp("checkpoint"))


def test_classifier_is_accurate_and_calibrated(trained, labelled):
    test = labelled(200, 3)
    predicted = trained.predict(test.prompts)
    error = np.abs(np.array([p.length for p in predicted]) - test.length).mean()
    assert error < 0.4 * np.abs(np.median(test.length) - test.length).mean()
    assert 0.82 <= np.mean([actual <= p.p90 for p, actual in zip(predicted, test.length, strict=True)]) <= 0.98
    assert all(1.0 <= p.p50 <= p.p90 for p in predicted)
    assert (trained.classify(test.prompts) == trained.buckets.index_of(test.length)).mean() > 0.3


def test_saved_classifier_loads_and_holds_no_code(trained, labelled, tmp_path):
    trained.save(tmp_path)
    kinds = {file.suffix for file in tmp_path.rglob("*") if file.is_file()}
    assert kinds <= {".json", ".safetensors"}
    prompts = labelled(20, 4).prompts
    loaded = load_model(tmp_path)
    assert loaded.reads_text
    assert loaded.name == "tiny"
    for prediction, expected in zip(loaded.predict(prompts), trained.predict(prompts), strict=True):
        assert prediction.p50 == pytest.approx(expected.p50, rel=1e-3)


def test_padding_and_batching_do_not_change_predictions(trained):
    prompts = ["define moss", "please explain tides copper kites moss tides copper kites", "draft"]
    together = trained.probabilities(prompts)
    alone = np.concatenate([trained.probabilities([prompt]) for prompt in prompts])
    assert together == pytest.approx(alone, abs=1e-5)


@pytest.mark.parametrize("prompt", ["", "\ud800", "moss " * 5000])
def test_predictions_of_unusual_prompts_are_finite(trained, prompt):
    (prediction,) = trained.predict([prompt])
    assert np.isfinite([prediction.p50, prediction.p90]).all()


def test_long_prompt_is_truncated(trained):
    long = "explain " + "moss " * 63
    assert trained.probabilities([long + "tides"]) == pytest.approx(
        trained.probabilities([long + "kites " * 900]), abs=1e-6
    )


def test_predict_rejects_hashed_features(trained):
    from predictor_service.model.classifier import NeedsText

    with pytest.raises(NeedsText):
        trained.predict([prompt_features("define moss")])


@pytest.mark.parametrize("strategy", ["equal-width", "equal-frequency"])
def test_resumed_training_gives_same_model(fit, labelled, tmp_path, strategy):
    options = {"epochs": 2, "checkpoint_steps": 1, "strategy": strategy}
    whole = fit((64, 5), (40, 6), tmp_path / "whole", **options)

    def interrupt_at_half(share: float) -> None:
        if share > 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit((64, 5), (40, 6), tmp_path / "interrupted", interrupt_at_half, **options)
    steps: list[float] = []
    resumed = fit((64, 5), (40, 6), tmp_path / "interrupted", steps.append, **options)
    assert len(steps) < 4
    prompts = labelled(40, 6).prompts
    assert resumed.probabilities(prompts) == pytest.approx(whole.probabilities(prompts), abs=1e-6)


def test_load_model_accepts_card_of_earlier_version(trained, tmp_path):
    trained.save(tmp_path)
    card = json.loads((tmp_path / CARD_FILE).read_text())
    card["recipe"]["most_prompt_tokens"] = card["recipe"].pop("max_prompt_tokens")
    (tmp_path / CARD_FILE).write_text(json.dumps(card))
    assert load_model(tmp_path).encoder.max_tokens == 64


def test_load_model_rejects_damaged_folder(trained, tmp_path):
    trained.save(tmp_path)
    card = json.loads((tmp_path / CARD_FILE).read_text())
    (tmp_path / CARD_FILE).write_text(json.dumps(card | {"recipe": {}}))
    with pytest.raises(ModelUnusable, match="cannot be read"):
        load_model(tmp_path)


def test_fit_classifier_rejects_small_validation_part(fit, tmp_path):
    with pytest.raises(ValueError, match="at least 20"):
        fit((50, 1), (5, 2), tmp_path)


def test_default_recipe_is_that_of_the_paper(training):
    recipe = training.ClassifierRecipe()
    assert (recipe.base, recipe.bins, recipe.strategy) == ("facebook/opt-125m", 100, "equal-width")
    assert (recipe.learning_rate, recipe.betas, recipe.batch, recipe.epochs) == (2e-5, (0.9, 0.999), 64, 8)
    assert recipe.max_prompt_tokens == 2048


def test_commands_train_evaluate_and_study_classifier(base, labelled, tmp_path, monkeypatch):
    rows = labelled(260, 7)
    lines = [
        {"prompt": f"{prompt} [{n}]", "length": int(length)}
        for n, (prompt, length) in enumerate(zip(rows.prompts, rows.length, strict=True))
    ]
    data = write_jsonl(tmp_path / "lengths.jsonl", lines)
    folder = tmp_path / "model"
    quick = ["--data", str(data), "--epochs", "3", "--batch", "32", "--learning-rate", "0.003", "--json"]
    train = ["train", "--family", "classifier", "--base", str(base), "--output", str(folder), "--bins", "20", *quick]
    trained = CliRunner().invoke(cli.app, train)
    assert trained.exit_code == 0, trained.output
    card = json.loads(trained.stdout)
    assert (card["family"], card["recipe"]["bins"], card["recipe"]["max_prompt_tokens"]) == ("classifier", 20, 64)

    evaluated = CliRunner().invoke(cli.app, ["evaluate", "--model", str(folder), "--data", str(data), "--json"])
    assert evaluated.exit_code == 0, evaluated.output
    metrics = json.loads(evaluated.stdout)
    assert metrics["mae_tokens"] == pytest.approx(card["metrics"]["test"]["mae_tokens"], abs=0.01)

    with TestClient(create_app(load_model(folder))) as client:
        response = client.post("/v1/predict", json={"inputs": [{"prompt": "please draft moss"}]})
    assert response.status_code == 200
    assert response.json()["predictions"][0]["p90"] >= response.json()["predictions"][0]["p50"] >= 1

    monkeypatch.setattr(training_run, "PAPER_BINS", (10, 20))
    study = ["evaluate", "--bins", "--model", str(folder), *quick, "--epochs", "1"]
    studied = CliRunner().invoke(cli.app, study)
    assert studied.exit_code == 0, studied.output
    table = json.loads(studied.stdout)["buckets"]
    assert [(row["strategy"], row["asked_bins"]) for row in table] == [
        ("equal-width", 10),
        ("equal-width", 20),
        ("equal-frequency", 10),
        ("equal-frequency", 20),
    ]
    assert all(0 <= row["accuracy"] <= row["off_by_2"] <= 1 for row in table)
