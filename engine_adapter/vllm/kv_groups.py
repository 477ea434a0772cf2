"""Blocks of KV memory that vLLM's requests hold and need, over all KV cache groups.

Layers of a kind form a group, and each group holds blocks of its own: full attention for all tokens, a sliding window
or a state space model for the latest ones. All groups take their blocks from one pool.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.request import Request

TYPICAL_TOKENS = 2048
"""Length of the requests for which `KvGroups.capacity_tokens` counts. Conversations are about as long. Convention."""


class KvGroups:
    """The groups of one engine: their managers, the tokens in a block, and the most blocks that a request holds."""

    def __init__(self, manager: KVCacheManager, config: VllmConfig) -> None:
        self._total = int(manager.block_pool.num_gpu_blocks)
        managers: tuple[Any, ...] = manager.coordinator.single_type_managers
        self._groups: list[tuple[Any, int, int]] = [
            (each, each.block_size, _most(each.kv_cache_spec, config)) for each in managers
        ]
        block = max((size for _, size, _ in self._groups), default=1)
        typical = min(int(config.model_config.max_model_len), TYPICAL_TOKENS)
        self._typical = max(block, typical // block * block)

    def needed(self, tokens: int) -> int:
        """Return the most blocks that a request of ``tokens`` tokens holds."""
        return sum([min(-(-tokens // size), most) for _, size, most in self._groups])

    def held(self, request: Request) -> int:
        """Return the blocks that ``request`` holds, without those that its next step frees: they left a window."""
        held, settled = 0, request.num_computed_tokens - request.num_in_flight_tokens
        for manager, size, _ in self._groups:
            blocks = len(manager.req_to_blocks.get(request.request_id, ()))
            held += max(0, blocks - manager.get_num_skipped_tokens(settled) // size) if blocks else 0
        return held

    @property
    def capacity_tokens(self) -> int:
        """Tokens of requests of typical length that fit in the memory.

        NOTE: vLLM's own figure (``kv_cache_size_tokens``) counts requests of ``max_model_len``. Where windows are much
        shorter than that, several times fewer tokens of shorter requests fit.
        """
        return self._total * self._typical // max(1, self.needed(self._typical))


def _most(spec: Any, config: VllmConfig) -> int:
    return -(-int(spec.max_memory_usage_bytes(config)) // int(spec.page_size_bytes))
