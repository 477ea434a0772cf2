"""The memory that request bodies share."""

from __future__ import annotations

import asyncio

import pytest

from gateway.api import body_memory
from gateway.api.body_memory import FREE_BYTES, BodyMemory, BodyReservation
from gateway.api.errors import ApiError
from gateway.api.shared_limit import Sharer
from tests.fixtures.live_server import HANG_S


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
    await asyncio.wait_for(waiting, HANG_S)
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
                async with asyncio.timeout(HANG_S) as timer:
                    await body.grow(FREE_BYTES + 500, timer)
                    await asyncio.Event().wait()
            except TimeoutError:
                assert body.evicted
                evicted.append(name)

    tasks = [asyncio.create_task(half_sent(name)) for name in ("first", "second")]
    await asyncio.sleep(0.01)
    with memory.reservation() as other:
        await asyncio.wait_for(other.grow(FREE_BYTES + 400), HANG_S)
        assert evicted == ["first"]
        assert memory.used == 900
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert memory.used == 0


async def held_by(memory: BodyMemory, sharer: Sharer, count: int, size: int) -> list[BodyReservation]:
    bodies = [memory.reservation(sharer) for _ in range(count)]
    for body in bodies:
        await asyncio.wait_for(body.grow(FREE_BYTES + size), HANG_S)
    return bodies


async def test_tenant_leaves_memory_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body_memory, "WAIT_S", 0.1)
    memory = BodyMemory(9000)
    bodies = await held_by(memory, Sharer("a"), 8, 1000)
    with pytest.raises(ApiError, match=r"this tenant take its part of limits\.body_memory_bytes"):
        await memory.reservation(Sharer("a")).grow(FREE_BYTES + 1000)
    (other,) = await held_by(memory, Sharer("b"), 1, 1000)
    with pytest.raises(ApiError, match=r"limits\.body_memory_bytes is in use"):
        await memory.reservation(Sharer("b")).grow(FREE_BYTES + 500)
    for body in (*bodies, other):
        body.shrink(0)
    assert memory.used == 0


async def test_waiting_bodies_of_one_tenant_do_not_delay_another() -> None:
    memory = BodyMemory(9000)
    await held_by(memory, Sharer("a"), 8, 1000)
    waiting = [asyncio.create_task(memory.reservation(Sharer("a")).grow(FREE_BYTES + 1000)) for _ in range(5)]
    await asyncio.sleep(0.01)
    started = asyncio.get_running_loop().time()
    await held_by(memory, Sharer("b"), 1, 1000)
    assert asyncio.get_running_loop().time() < started + 1
    for task in waiting:
        task.cancel()


@pytest.mark.parametrize(("waits", "evicted"), [("a", ["a"]), ("b", ["b"]), ("c", ["a"])])
async def test_slow_body_loses_its_memory_to_its_tenant_or_one_that_holds_less(
    monkeypatch: pytest.MonkeyPatch, waits: str, evicted: list[str]
) -> None:
    monkeypatch.setattr(body_memory, "UPLOAD_S", 0.0)
    memory = BodyMemory(9000)
    lost: list[str] = []

    async def half_sent(tenant: str, size: int) -> None:
        with memory.reservation(Sharer(tenant)) as body:
            try:
                async with asyncio.timeout(HANG_S) as timer:
                    await body.grow(FREE_BYTES + size, timer)
                    await asyncio.Event().wait()
            except TimeoutError:
                lost.append(tenant)

    # The body of tenant b is the oldest.
    tasks = [asyncio.create_task(half_sent(*body)) for body in (("b", 1000), ("a", 5000), ("a", 2000))]
    await asyncio.sleep(0.01)
    await asyncio.wait_for(memory.reservation(Sharer(waits)).grow(FREE_BYTES + 1500), HANG_S)
    assert lost == evicted
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
