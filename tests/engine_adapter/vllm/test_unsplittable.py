"""Prompts that vLLM cannot split at will: the step gate leaves them enough of a step."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from engine_adapter.vllm.unsplittable import least_prefill_tokens


def scheduler(**changes: Any) -> SimpleNamespace:
    defaults: dict[str, Any] = {
        "enable_chunked_prefill": True, "disable_chunked_mm_input": False,
        "need_mamba_block_aligned_split": False, "block_size": 528, "num_prefill_lookahead": 0, "num_spec_tokens": 0,
    }  # fmt: skip
    members = {**defaults, **changes}
    return SimpleNamespace(
        scheduler_config=SimpleNamespace(**{name: members.pop(name) for name in list(members)[:2]}),
        cache_config=SimpleNamespace(block_size=members.pop("block_size")),
        **members,
    )


def prompt(tokens: int, computed: int = 0, items: tuple[tuple[int, int], ...] = ()) -> Any:
    """A prompt of ``tokens``; ``items``: offset and length of its images."""
    features = [SimpleNamespace(mm_position=SimpleNamespace(offset=at, length=length)) for at, length in items]
    return SimpleNamespace(
        num_tokens=tokens, num_computed_tokens=computed, mm_features=features, has_encoder_inputs=bool(features)
    )


IMAGES = ((20, 300), (400, 576))


@pytest.mark.parametrize(
    ("changes", "request_", "expected"),
    [
        ({}, prompt(1000), 1),
        ({"enable_chunked_prefill": False}, prompt(1000), 1000),
        ({"enable_chunked_prefill": False}, prompt(1000, 900), 100),
        ({"need_mamba_block_aligned_split": True}, prompt(1000), 528),
        ({"need_mamba_block_aligned_split": True}, prompt(1000, 900), 100),
        ({}, prompt(1000, items=IMAGES), 1),
        ({"disable_chunked_mm_input": True}, prompt(1000, items=IMAGES), 576),
        ({"disable_chunked_mm_input": True}, prompt(1000, 976, items=IMAGES), 1),
        ({"disable_chunked_mm_input": True, "num_prefill_lookahead": 3}, prompt(1000, items=IMAGES), 579),
        ({"num_prefill_lookahead": 3}, prompt(1000), 4),
        ({"num_prefill_lookahead": 3}, prompt(1000, 998), 2),
    ],
)
def test_least_prefill_is_what_cannot_be_split(changes: dict[str, Any], request_: Any, expected: int) -> None:
    assert least_prefill_tokens(scheduler(**changes), [request_, prompt(5)], lambda prompt: 0) == expected


def test_least_prefill_is_nothing_without_prompts() -> None:
    assert least_prefill_tokens(scheduler(), [], lambda prompt: 0) == 0


@pytest.mark.parametrize(
    ("request_", "cached", "expected"),
    [(prompt(1), 0, 4), (prompt(33), 32, 4), (prompt(33), 16, 1), (prompt(2), 0, 1), (prompt(33, 32), 0, 1)],
    ids=["one token", "all but one cached", "more left", "two tokens", "running"],
)
def test_least_prefill_includes_the_padding_of_a_waiting_prompt(request_: Any, cached: int, expected: int) -> None:
    assert least_prefill_tokens(scheduler(num_spec_tokens=3), [request_], lambda prompt: cached) == expected
