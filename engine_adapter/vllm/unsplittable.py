"""The fewest prefill tokens of a step with which vLLM computes anything of a prompt that it cannot split at will."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.v1.request import Request


def least_prefill_tokens(scheduler: Any, prompts: Iterable[Request], cached_tokens: Callable[[Request], int]) -> int:
    """Return the prefill tokens that a step must allow, beside its decodes, so that the first prompt makes progress.

    ``scheduler``: vLLM's. ``prompts``: those left to compute, in its order. ``cached_tokens``: of a waiting one, those
    in the prefix cache. With a smaller budget vLLM would compute nothing of the first one, nor of those behind it.
    """
    config = scheduler.scheduler_config
    prompt = next(iter(prompts), None)
    if prompt is None:
        return 0
    left: int = prompt.num_tokens - prompt.num_computed_tokens
    if not config.enable_chunked_prefill:
        return left
    drafts: int = scheduler.num_spec_tokens
    if drafts and not prompt.num_computed_tokens and left - cached_tokens(prompt) == 1:
        # vLLM pads the only token of a waiting prompt to the size of a decode with drafts, or lets the prompt wait.
        return 1 + drafts
    least: int = 1
    if scheduler.need_mamba_block_aligned_split:
        # A chunk ends at the end of a block, because only there is the state of Mamba layers kept.
        least = scheduler.cache_config.block_size
    if config.disable_chunked_mm_input and prompt.has_encoder_inputs:
        items = [feature.mm_position for feature in prompt.mm_features]
        ahead = [item.length for item in items if item.offset + item.length > prompt.num_computed_tokens]
        least = max([least, *ahead])
    # A drafter that reads tokens ahead needs them in the step too. NOTE: vLLM 0.26 has no such drafter.
    lookahead: int = getattr(scheduler, "num_prefill_lookahead", 0)
    return min(left, least + lookahead)
