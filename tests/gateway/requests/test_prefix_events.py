"""`PrefixEvents`: an engine's own block names lead to the hashes of the gateway's prompts."""

from __future__ import annotations

from engine_adapter.engine import BlocksRemoved, BlocksStored, PrefixCacheCleared
from gateway.requests.prefix_events import PrefixEvents
from gateway.requests.prefix_index import TOKEN_BYTES, PrefixIndex, hash_blocks, prefix_root, token_bytes
from gateway.requests.request import Request
from gateway.requests.slo import Slo

BLOCK = 16
TOKENS = list(range(100))


def a_request(tokens: list[int], adapter: str = "", salt: str = "") -> Request:
    request = Request("r", "chat", 0.0, Slo(ttft_s=1.0), len(tokens), 10.0, block_tokens=BLOCK)
    request.blocks = hash_blocks(prefix_root(adapter, salt), token_bytes(tokens), BLOCK * TOKEN_BYTES)
    return request


def stored(first: int, last: int, parent: object = None, **changes: str) -> BlocksStored:
    """Return the event for the blocks ``first`` to ``last`` of `TOKENS`, named by their numbers."""
    names = tuple(f"block {number}" for number in range(first, last + 1))
    return BlocksStored(names, parent, TOKENS[first * BLOCK : (last + 1) * BLOCK], BLOCK, **changes)


def test_stored_blocks_are_expected_in_the_cache() -> None:
    index = PrefixIndex()
    events = PrefixEvents(index)
    events.apply([stored(0, 1), stored(2, 2, "block 1")])
    assert index.cached_tokens(a_request(TOKENS)) == 48
    assert index.cached_tokens(a_request(TOKENS, salt="a")) == 0
    assert index.cached_tokens(a_request(TOKENS, adapter="lora")) == 0
    assert index.tokens == 48


def test_blocks_of_a_salt_or_an_adapter_are_found_by_it_only() -> None:
    index = PrefixIndex()
    events = PrefixEvents(index)
    events.apply([stored(0, 2, salt="a"), stored(3, 4, "block 2", salt="a"), stored(0, 0, adapter="lora")])
    assert index.cached_tokens(a_request(TOKENS, salt="a")) == 80
    assert index.cached_tokens(a_request(TOKENS, adapter="lora")) == 16
    assert index.cached_tokens(a_request(TOKENS)) == 0


def test_removed_blocks_are_not_expected_any_more() -> None:
    index = PrefixIndex()
    events = PrefixEvents(index)
    events.apply([stored(0, 4), BlocksRemoved(("block 3", "block 4", "unknown"))])
    assert index.cached_tokens(a_request(TOKENS)) == 48
    events.apply([stored(3, 3, "block 2")])
    assert index.cached_tokens(a_request(TOKENS)) == 64


def test_blocks_after_an_unknown_one_are_ignored() -> None:
    index = PrefixIndex()
    PrefixEvents(index).apply([stored(2, 4, "missed")])
    assert len(index) == 0


def test_cleared_cache_is_empty() -> None:
    index = PrefixIndex()
    events = PrefixEvents(index)
    events.apply([stored(0, 4), PrefixCacheCleared(), stored(5, 5, "block 4")])
    assert (len(index), index.tokens) == (0, 0.0)
