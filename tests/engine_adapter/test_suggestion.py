"""Advice on misspelled names."""

from __future__ import annotations

import pytest

from engine_adapter.suggestion import did_you_mean


@pytest.mark.parametrize(
    ("name", "known", "advice"),
    [
        ("etta", ["eta", "slack_s"], "did you mean 'eta'?"),
        ("max_wait", ["max_weight", "max_wait_s"], "did you mean 'max_wait_s'?"),
        ("x", ["eta", "slack_s"], "its options: eta, slack_s"),
        ("x", [], "its options: none"),
    ],
)
def test_advice_is_the_most_similar_name_or_else_all(name: str, known: list[str], advice: str) -> None:
    assert did_you_mean(name, known, "its options:") == advice


def test_advice_quotes_as_its_caller_does() -> None:
    assert did_you_mean("prot", {"port": 8100}, "the keys here are", quote="`") == "did you mean `port`?"
