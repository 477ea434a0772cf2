"""Receives vLLM's KV events: which blocks of prompts its prefix cache stored and evicted.

vLLM publishes them over ZeroMQ if its flag ``kv-events-config`` enables that. Without them, the gateway predicts what
the cache holds from the prompts that it sent.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from engine_adapter.engine import BlocksRemoved, BlocksStored, PrefixCacheCleared, PrefixCacheEvent

log = logging.getLogger("antares.engine.vllm")

_MAX_QUEUED = 100_000
"""Messages that wait in the socket before ZeroMQ drops new ones, as on vLLM's side. A gap clears what is known."""


def subscription(config: Any) -> tuple[str, str] | None:
    """Return the address and the topic of the events; None unless ``config``, vLLM's `KVEventsConfig`, enables them."""
    if config is None or not config.enable_kv_cache_events or config.publisher != "zmq":
        return None
    # The publisher may listen on all interfaces; it is on this machine.
    return config.endpoint.replace("*", "127.0.0.1"), config.topic


async def receive_events(address: str, topic: str, on_events: Callable[[Sequence[PrefixCacheEvent]], None]) -> None:
    """Pass the events published at ``address`` to ``on_events`` until cancelled."""
    import msgspec
    import zmq.asyncio
    from vllm.distributed.kv_events import KVEventBatch

    decoder = msgspec.msgpack.Decoder(KVEventBatch)
    context = zmq.asyncio.Context()
    socket = context.socket(zmq.SUB)
    socket.setsockopt(zmq.RCVHWM, _MAX_QUEUED)
    socket.connect(address)
    socket.subscribe(topic)
    expected: int | None = None
    try:
        while True:
            _, sequence, payload = await socket.recv_multipart()
            number = int.from_bytes(sequence, "big")
            # Events before the first one that is received here concern an empty cache, or were missed.
            missed = number != expected if expected is not None else number > 0
            expected = number + 1
            if missed:
                log.warning("some KV events were missed, so cached prompts are not known until they are used again")
                on_events([PrefixCacheCleared()])
            try:
                on_events(list(_translated(decoder.decode(payload).events)))
            except msgspec.DecodeError as error:
                log.warning("a KV event was not understood: %s", error)
    finally:
        socket.close(linger=0)
        context.term()


def _translated(events: Sequence[Any]) -> Iterator[PrefixCacheEvent]:
    for event in events:
        kind = type(event).__name__
        if kind == "BlockStored":
            salt = _salt(event)
            # Blocks with images have a key that their placeholder tokens do not tell.
            if salt is not None and event.block_hashes and event.medium in (None, "GPU"):
                yield BlocksStored(
                    tuple(event.block_hashes),
                    event.parent_block_hash,
                    event.token_ids,
                    event.block_size,
                    event.lora_name or "",
                    salt,
                )
        elif kind == "BlockRemoved":
            if event.medium in (None, "GPU"):
                yield BlocksRemoved(tuple(event.block_hashes))
        elif kind == "AllBlocksCleared":
            yield PrefixCacheCleared()


def _salt(event: Any) -> str | None:
    """Return the cache salt of the first block, "" without one; None for blocks that hold more than text."""
    salt = ""
    for keys in event.extra_keys or ():
        for key in keys or ():
            if not isinstance(key, str):
                return None
            if key != event.lora_name:
                salt = key
    return salt
