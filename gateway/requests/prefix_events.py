"""Applies an engine's own events about its prefix cache to the index that predicts it."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from engine_adapter.engine import BlocksRemoved, BlocksStored, PrefixCacheCleared, PrefixCacheEvent
from gateway.requests.prefix_index import MAX_BLOCKS, TOKEN_BYTES, PrefixIndex, hash_blocks, prefix_root, token_bytes


class PrefixEvents:
    """Translates an engine's block hashes to those of ``index``, which depend on the same content."""

    def __init__(self, index: PrefixIndex) -> None:
        self._index = index
        self._keys: dict[Hashable, int] = {}

    def apply(self, events: Sequence[PrefixCacheEvent]) -> None:
        """Apply ``events`` in their order."""
        for event in events:
            if isinstance(event, BlocksStored):
                self._stored(event)
            elif isinstance(event, BlocksRemoved):
                self._index.removed([key for name in event.names if (key := self._keys.pop(name, None)) is not None])
            elif isinstance(event, PrefixCacheCleared):
                self.clear()

    def clear(self) -> None:
        """Forget all blocks."""
        self._keys.clear()
        self._index.clear()

    def _stored(self, event: BlocksStored) -> None:
        root: int | None = prefix_root(event.adapter, event.salt)
        if event.parent is not None:
            root = self._keys.get(event.parent)
        if root is None or len(self._keys) >= MAX_BLOCKS:
            return  # The block before it is not known, so a prompt that reaches this one cannot be recognised.
        keys = hash_blocks(root, token_bytes(event.token_ids), event.block_size * TOKEN_BYTES)
        self._keys.update(zip(event.names, keys, strict=False))
        self._index.stored(keys, event.block_size)
