"""KV events from vLLM's own publisher, over a real socket."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engine_adapter.engine import BlocksRemoved, BlocksStored, PrefixCacheCleared, PrefixCacheEvent
from engine_adapter.vllm.kv_events import receive_events, subscription
from tests.fixtures.live_server import HANG_S

# vLLM is imported, which takes seconds; no engine is started.
pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (None, None),
        ({"enable_kv_cache_events": False}, None),
        ({"publisher": "null"}, None),
        ({}, ("tcp://127.0.0.1:5557", "")),
        ({"endpoint": "ipc:///tmp/a", "topic": "kv"}, ("ipc:///tmp/a", "kv")),
    ],
)
def test_subscription_follows_vllms_own_flag(config: dict[str, Any] | None, expected: object) -> None:
    defaults = {"enable_kv_cache_events": True, "publisher": "zmq", "endpoint": "tcp://*:5557", "topic": ""}
    assert subscription(None if config is None else SimpleNamespace(**{**defaults, **config})) == expected


async def test_events_of_vllms_publisher_arrive(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    from vllm.distributed.kv_events import (
        AllBlocksCleared,
        BlockRemoved,
        BlockStored,
        KVEventBatch,
        ZmqEventPublisher,
    )

    def stored(**changes: Any) -> BlockStored:
        fields: dict[str, Any] = {
            "block_hashes": [1, 2], "parent_block_hash": None, "token_ids": list(range(32)), "block_size": 16,
            "lora_id": None, "medium": "GPU", "lora_name": None,
        }  # fmt: skip
        return BlockStored(**{**fields, **changes})

    address = f"ipc://{tmp_path}/kv"
    publisher = ZmqEventPublisher(0, endpoint=address)
    received: list[PrefixCacheEvent] = []

    def on_events(events: Sequence[PrefixCacheEvent]) -> None:
        received.extend(events)

    task = asyncio.create_task(receive_events(address, "", on_events))
    try:
        sent = 1000
        async with asyncio.timeout(HANG_S):
            # Until the subscription has reached the publisher, and all of these events have arrived.
            while not received or received[-1] != BlocksStored((sent,), None, list(range(32)), 16):
                if not received:
                    sent += 1
                    publisher.publish(KVEventBatch(ts=0.0, events=[stored(block_hashes=[sent])]))
                await asyncio.sleep(0.05)
        received.clear()
        batch = [
            stored(),
            stored(extra_keys=[("salt",), None]),
            stored(extra_keys=[("lora", "salt"), ("lora",)], lora_name="lora"),
            stored(extra_keys=[(("image", 3),), None]),
            stored(medium="CPU"),
            BlockRemoved(block_hashes=[1], medium="GPU"),
            AllBlocksCleared(),
        ]
        publisher.publish(KVEventBatch(ts=0.0, events=batch))
        async with asyncio.timeout(HANG_S):
            while len(received) < 5:
                await asyncio.sleep(0.01)
        tokens = list(range(32))
        assert received == [
            BlocksStored((1, 2), None, tokens, 16),
            BlocksStored((1, 2), None, tokens, 16, salt="salt"),
            BlocksStored((1, 2), None, tokens, 16, adapter="lora", salt="salt"),
            BlocksRemoved((1,)),
            PrefixCacheCleared(),
        ]
        next(publisher._seq_gen)  # one message is lost
        publisher.publish(KVEventBatch(ts=0.0, events=[stored()]))
        async with asyncio.timeout(HANG_S):
            while len(received) < 7:
                await asyncio.sleep(0.01)
        assert received[5:] == [PrefixCacheCleared(), BlocksStored((1, 2), None, tokens, 16)]
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        publisher.shutdown()
