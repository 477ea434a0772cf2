"""The sample chats that a server counts when it comes up."""

from __future__ import annotations

from gateway.api.prompt import read_chat
from gateway.prompts.content import Feature
from gateway.prompts.samples import sample_chats


def test_samples_cover_every_feature_but_audio_and_reasoning() -> None:
    features = [sum(values) for values in zip(*(read_chat(chat).features for chat in sample_chats()), strict=True)]
    for at in (Feature.REQUEST, Feature.TOOLS, Feature.CALLS, Feature.IMAGES, Feature.LARGE_PATCHES):
        assert features[at] > 0, at
    assert all(features[: Feature.REQUEST // 2]), "every kind of character"


def test_samples_are_small() -> None:
    sizes = [len(str(chat)) for chat in sample_chats()]
    assert 50 < len(sizes) < 120
    assert max(sizes) < 20_000
