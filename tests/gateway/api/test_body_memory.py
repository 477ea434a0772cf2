"""The memory that request bodies share."""

from __future__ import annotations

import asyncio

import pytest

from gateway.api import body_memory
from gateway.api.body_memory import FREE_BYTES, BodyMemory
from gateway.api.errors import ApiError


async def test_small_bodies_need_no_memory() -> None:
    memory = BodyMemory(1)
    with memory.reservation() as small:
        await small.grow(FREE_BYTES)
        assert memory.used == 0


async def test_memory_is_freed_at_the_end_of_the_request() -> None:
    memory = BodyMemory(1000)
    with memory.reservation() as body:
        await body.grow(FREE_BYTES + 900)
        body.received(FREE_BYTES + 100)
        assert memory.used == 100
    assert memory.used == 0


async def test_waiting_request_gets_what_another_frees() -> None:
    memory = BodyMemory(1000)
    first, second = memory.reservation(), memory.reservation()
    await first.grow(FREE_BYTES + 1000)
    waiting = asyncio.create_task(second.grow(FREE_BYTES + 500))
    await asyncio.sleep(0.01)
    assert not waiting.done()
    first.shrink(0)
    await asyncio.wait_for(waiting, 1)
    assert memory.used == 500


async def test_request_without_memory_gets_503(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body_memory, "WAIT_S", 0.05)
    memory = BodyMemory(1000)
    await memory.reservation().grow(FREE_BYTES + 1000)
    with pytest.raises(ApiError) as raised:
        await memory.reservation().grow(FREE_BYTES + 1)
    assert (raised.value.status, raised.value.code) == (503, "body_memory_full")
    assert memory.used == 1000


async def test_body_that_takes_longest_to_arrive_loses_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body_memory, "UPLOAD_S", 0.0)
    memory = BodyMemory(1000)
    evicted: list[str] = []

    async def half_sent(name: str) -> None:
        with memory.reservation() as body:
            try:
                async with asyncio.timeout(10) as timer:
                    await body.grow(FREE_BYTES + 500, timer)
                    await asyncio.Event().wait()
            except TimeoutError:
                assert body.evicted
                evicted.append(name)

    tasks = [asyncio.create_task(half_sent(name)) for name in ("first", "second")]
    await asyncio.sleep(0.01)
    with memory.reservation() as other:
        await asyncio.wait_for(other.grow(FREE_BYTES + 400), 2)
        assert evicted == ["first"]
        assert memory.used == 900
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert memory.used == 0
