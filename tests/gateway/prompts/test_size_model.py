"""The estimate of prompt sizes: what it learns from the engine's counts, and what it must survive."""

from __future__ import annotations

import random

import numpy as np

from gateway.prompts.content import Feature, Features, PromptContent
from gateway.prompts.size_model import MAX_MODELS, PromptSizeModel, PromptSizes

WORDS = ["the", "scheduling", "of", "requests", "under", "load", "is", "described", "with", "care", "and", "measured"]


def a_prompt(choice: random.Random) -> Features:
    """Return the features of a chat with some English and some Chinese."""
    content = PromptContent()
    for _ in range(choice.randrange(1, 5)):
        content.add_message("user")
        content.add_text(" ".join(choice.choices(WORDS, k=choice.randrange(20, 300))))
        content.add_text("漢字" * choice.randrange(0, 100))
    return content.features()


def true_tokens(features: Features) -> int:
    """Return the size by a tokenizer that needs two tokens for a Chinese character, and 40 for its template."""
    chinese, words = features[10], features[13]
    return round(1.1 * words + 2.0 * chinese + 6 * features[Feature.MESSAGES] + 40)


def test_model_learns_another_tokenizer_within_fifty_counts() -> None:
    choice, model = random.Random(1), PromptSizeModel()
    held_out = [a_prompt(choice) for _ in range(100)]

    def errors() -> list[float]:
        return [abs(model.tokens(x) / true_tokens(x) - 1) for x in held_out]

    assert np.median(errors()) > 0.15
    for _ in range(50):
        features = a_prompt(choice)
        model.learn(features, true_tokens(features))
    assert np.median(errors()) < 0.03
    assert np.quantile(errors(), 0.9) < 0.08


def test_model_follows_a_template_that_changes() -> None:
    choice, model = random.Random(2), PromptSizeModel()
    for _ in range(300):
        features = a_prompt(choice)
        model.learn(features, true_tokens(features))
    for _ in range(300):
        features = a_prompt(choice)
        model.learn(features, true_tokens(features) + 500)
    features = a_prompt(choice)
    assert abs(model.tokens(features) / (true_tokens(features) + 500) - 1) < 0.1


def test_model_stays_finite_whatever_it_is_told() -> None:
    choice, model = random.Random(3), PromptSizeModel()
    for _ in range(500):
        model.learn(a_prompt(choice), choice.choice([1, 10, 100_000, 10**7]))
    assert 1 <= model.tokens(a_prompt(choice)) < 10**9


def test_sizes_keep_the_models_used_last() -> None:
    sizes = PromptSizes()
    kept = sizes.of("kept")
    for number in range(MAX_MODELS + 10):
        sizes.of(str(number))
        assert sizes.of("kept") is kept
    assert sizes.of("0").counts == 0
