"""`PromptSizer`: the size and the blocks of a prompt on the engine that a request was placed on."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.api.prompt import read_chat, read_completion
from gateway.api.prompt_size import PromptSizer
from tests.fixtures.policy_builders import engine, make_request

TEXT = "a story of a fox " * 100


def test_size_on_another_engine_starts_without_a_hit() -> None:
    request = make_request(cached_tokens=90, shared_tokens=80)
    document: dict[str, Any] = {"messages": [{"role": "user", "content": "short"}]}
    PromptSizer().estimate(request, read_chat(document), document, engine())
    assert (request.blocks, request.cached_tokens, request.shared_tokens) == ((), 0, 0)


@pytest.mark.parametrize(
    ("fields", "reads_cache"),
    [
        ({}, True),
        ({"prompt_logprobs": None, "echo": True}, True),
        ({"logprobs": 1}, True),
        ({"prompt_logprobs": 0}, False),
        ({"echo": True, "logprobs": 1}, False),
        ({"echo": True, "top_logprobs": 1}, False),
    ],
)
def test_prompt_whose_log_probabilities_are_asked_for_is_not_expected_in_the_cache(
    fields: dict[str, Any], reads_cache: bool
) -> None:
    """vLLM computes it whole, so each such request lowered the hits that are predicted for all others."""
    request, document = make_request(), {"prompt": TEXT, **fields}
    PromptSizer().estimate(request, read_completion(document), document, engine())
    assert bool(request.blocks) == reads_cache
