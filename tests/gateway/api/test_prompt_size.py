"""`PromptSizer`: the size and the blocks of a prompt on the engine that a request was placed on."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.api.prompt import Prompt, read_batch, read_chat, read_completion, read_responses
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


CHAT = {"messages": [{"role": "user", "content": TEXT}]}


@pytest.mark.parametrize(
    ("prompt", "tokens"),
    [
        (read_completion({"prompt": TEXT, "truncate_prompt_tokens": 1}), 1),
        (read_chat({**CHAT, "truncate_prompt_tokens": 1}), 1),
        (read_chat({**CHAT, "chat_template": "x"}), 1),
        (read_completion({"prompt": [TEXT] * 100}), 50_000),
        (read_batch({"messages": [CHAT["messages"]] * 100}), 50_000),
        (read_responses({"input": "go on", "previous_response_id": "resp_1"}), 50_000),
        (read_responses({"input": "go on", "conversation": {"id": "c"}}), 50_000),
        (read_responses({"input": "go on", "prompt": {"id": "p"}}), 50_000),
    ],
)
def test_count_of_a_prompt_that_is_not_all_in_the_body_teaches_nothing(prompt: Prompt, tokens: int) -> None:
    """Any client could otherwise change the sizes that are estimated for all others."""
    sizer, usual = PromptSizer(), read_chat(CHAT)
    before = sizer.sizes.of("m").tokens(usual.features)
    sizer.learn(prompt, "m", tokens)
    assert sizer.sizes.of("m").tokens(usual.features) == before
    sizer.learn(usual, "m", 2 * before)
    assert sizer.sizes.of("m").tokens(usual.features) > 1.5 * before


def test_models_that_the_server_does_not_list_share_no_blocks() -> None:
    state = engine(model="m", any_model=True)

    def blocks(**fields: Any) -> tuple[int, ...]:
        request, document = make_request(), {"prompt": TEXT, **fields}
        PromptSizer().estimate(request, read_completion(document), document, state)
        return request.blocks

    assert blocks() == blocks(model="m") == blocks(model="")
    assert len({blocks(model=name) for name in ("m", "a", "b")}) == 3
