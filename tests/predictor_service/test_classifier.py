"""The paper's family, end to end on CPU with a tiny, randomly initialised OPT: no download, a few seconds."""

import json

import numpy as np
import pytest

from tests.fixtures.untraced import untraced

with untraced():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    # With it comes much of the package, which loads its parts where they are first asked for.
    OPTModel = transformers.OPTModel

from starlette.testclient import TestClient
from typer.testing import CliRunner

from predictor_service import cli
from predictor_service.model.classifier import LengthClassifier, NeedsText
from predictor_service.model.features import prompt_features
from predictor_service.model.length_model import CARD_FILE, ModelUnusable, load_model
from predictor_service.serving.app import create_app
from predictor_service.training import fit_classifier as classifier_train
from predictor_service.training import run as training_run
from predictor_service.training.fit_classifier import ClassifierRecipe, Labelled, fit_classifier

WORDS = ["define", "translate", "explain", "draft", "tides", "moss", "copper", "kites", "please", "[PAD]", "[UNK]"]
TYPICAL = {"define": 30, "explain": 250, "draft": 600}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads cost such a small network more than they bring, most of all beside other work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder like one from a hub: a one-layer OPT of width 32 and a word-level tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("tiny-opt")
    torch.manual_seed(0)
    config = transformers.OPTConfig(
        vocab_size=len(WORDS), hidden_size=32, word_embed_proj_dim=16, ffn_dim=32, num_hidden_layers=1,
        num_attention_heads=4, max_position_embeddings=64, pad_token_id=9, bos_token_id=9, eos_token_id=9,
    )  # fmt: skip
    OPTModel(config).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({word: at for at, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]")
    fast.save_pretrained(folder)
    return folder


def made_up(rows: int, seed: int) -> Labelled:
    """Prompts whose verb decides how long the answer is, up to log-normal noise."""
    rng = np.random.default_rng(seed)
    verbs = rng.choice(list(TYPICAL), rows)
    prompts = [f"please {verb} {' '.join(rng.choice(WORDS[4:8], rng.integers(1, 6)))}" for verb in verbs]
    length = np.array([TYPICAL[verb] for verb in verbs]) * np.exp(rng.normal(0, 0.2, rows))
    return Labelled(prompts, np.round(length))


def recipe_for(base, **changes) -> ClassifierRecipe:
    return ClassifierRecipe(
        **{"base": str(base), "bins": 20, "learning_rate": 3e-3, "batch": 32, "epochs": 8, "rows_at_once": 32} | changes
    )


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory) -> LengthClassifier:
    workshop = tmp_path_factory.mktemp("workshop")
    return fit_classifier(made_up(320, 1), made_up(120, 2), recipe_for(base), {"model": "tiny"}, workshop)


def test_it_learns_what_decides_the_length_and_says_how_sure_it_is(trained):
    test = made_up(200, 3)
    predicted = trained.predict(test.prompts)
    error = np.abs(np.array([p.length for p in predicted]) - test.length).mean()
    assert error < 0.4 * np.abs(np.median(test.length) - test.length).mean()
    assert 0.82 <= np.mean([actual <= p.p90 for p, actual in zip(predicted, test.length, strict=True)]) <= 0.98
    assert all(1.0 <= p.p50 <= p.p90 for p in predicted)
    assert (trained.classify(test.prompts) == trained.buckets.place(test.length)).mean() > 0.3


def test_a_saved_folder_is_plain_data_and_serves_the_same_through_load_model(trained, tmp_path):
    trained.save(tmp_path)
    kinds = {file.suffix for file in tmp_path.rglob("*") if file.is_file()}
    assert kinds <= {".json", ".safetensors"}
    prompts = made_up(20, 4).prompts
    served = load_model(tmp_path)
    assert served.reads_text
    assert served.name == "tiny"
    for one, other in zip(served.predict(prompts), trained.predict(prompts), strict=True):
        assert one.p50 == pytest.approx(other.p50, rel=1e-3)


def test_padding_and_batching_do_not_change_a_prediction(trained):
    prompts = ["define moss", "please explain tides copper kites moss tides copper kites", "draft"]
    together = trained.shares(prompts)
    alone = np.concatenate([trained.shares([prompt]) for prompt in prompts])
    assert together == pytest.approx(alone, abs=1e-5)


@pytest.mark.parametrize("prompt", ["", "\ud800", "moss " * 5000])
def test_odd_prompts_are_no_trouble(trained, prompt):
    (prediction,) = trained.predict([prompt])
    assert np.isfinite([prediction.p50, prediction.p90]).all()


def test_a_long_prompt_is_cut_as_training_cut_it(trained):
    long = "explain " + "moss " * 63
    assert trained.shares([long + "tides"]) == pytest.approx(trained.shares([long + "kites " * 900]), abs=1e-6)


def test_hashed_features_are_refused(trained):
    with pytest.raises(NeedsText):
        trained.predict([prompt_features("define moss")])


@pytest.mark.parametrize("strategy", ["equal-width", "equal-frequency"])
def test_training_that_was_interrupted_ends_as_if_it_had_not_been(base, tmp_path, monkeypatch, strategy):
    recipe = recipe_for(base, epochs=2, checkpoint_steps=1, strategy=strategy)
    train, validation = made_up(64, 5), made_up(40, 6)
    whole = fit_classifier(train, validation, recipe, {"model": "a"}, tmp_path / "elsewhere_made", lambda share: None)

    def stop_half_way(share: float) -> None:
        if share > 0.5:
            raise KeyboardInterrupt

    workshop = tmp_path / "workshop"
    with pytest.raises(KeyboardInterrupt):
        fit_classifier(train, validation, recipe, {"model": "a"}, workshop, stop_half_way)
    steps = []
    resumed = fit_classifier(train, validation, recipe, {"model": "a"}, workshop, steps.append)
    assert len(steps) < 4
    assert resumed.shares(validation.prompts) == pytest.approx(whole.shares(validation.prompts), abs=1e-6)


def test_a_damaged_folder_says_so(trained, tmp_path):
    trained.save(tmp_path)
    card = json.loads((tmp_path / CARD_FILE).read_text())
    (tmp_path / CARD_FILE).write_text(json.dumps(card | {"recipe": {}}))
    with pytest.raises(ModelUnusable, match="cannot be read"):
        load_model(tmp_path)


def test_too_little_to_calibrate_on_is_said(base, tmp_path):
    with pytest.raises(ValueError, match="at least 20"):
        fit_classifier(made_up(50, 1), made_up(5, 2), recipe_for(base), {"model": "a"}, tmp_path)


def test_the_defaults_are_the_papers():
    recipe = classifier_train.ClassifierRecipe()
    assert (recipe.base, recipe.bins, recipe.strategy) == ("facebook/opt-125m", 100, "equal-width")
    assert (recipe.learning_rate, recipe.betas, recipe.batch, recipe.epochs) == (2e-5, (0.9, 0.999), 64, 8)
    assert recipe.most_prompt_tokens == 2048


def test_the_command_line_trains_serves_and_studies_it(base, tmp_path, monkeypatch):
    data = tmp_path / "lengths.jsonl"
    rows = made_up(260, 7)
    lines = [
        {"prompt": f"{prompt} [{n}]", "length": int(length)}
        for n, (prompt, length) in enumerate(zip(rows.prompts, rows.length, strict=True))
    ]
    data.write_text("\n".join(map(json.dumps, lines)))
    folder = tmp_path / "model"
    quick = ["--data", str(data), "--epochs", "3", "--batch", "32", "--learning-rate", "0.003", "--json"]
    train = ["train", "--family", "classifier", "--base", str(base), "--output", str(folder), "--bins", "20", *quick]
    trained = CliRunner().invoke(cli.app, train)
    assert trained.exit_code == 0, trained.output
    card = json.loads(trained.stdout)
    assert (card["family"], card["recipe"]["bins"], card["recipe"]["most_prompt_tokens"]) == ("classifier", 20, 64)

    evaluated = CliRunner().invoke(cli.app, ["evaluate", "--model", str(folder), "--data", str(data), "--json"])
    assert evaluated.exit_code == 0, evaluated.output
    metrics = json.loads(evaluated.stdout)
    assert metrics["mae_tokens"] == pytest.approx(card["metrics"]["test"]["mae_tokens"], abs=0.01)

    with TestClient(create_app(load_model(folder))) as client:
        answer = client.post("/v1/predict", json={"inputs": [{"prompt": "please draft moss"}]})
    assert answer.status_code == 200
    assert answer.json()["predictions"][0]["p90"] >= answer.json()["predictions"][0]["p50"] >= 1

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
