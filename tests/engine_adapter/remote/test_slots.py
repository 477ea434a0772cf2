"""Slots that requests take, and wait for in order of arrival."""

from __future__ import annotations

import asyncio

import pytest

from engine_adapter.remote.slots import Slots


async def waiting(slots: Slots, taken: list[int], number: int) -> None:
    await slots.wait()
    taken.append(number)


async def turn() -> None:
    """Let every task run until it waits."""
    for _ in range(3):
        await asyncio.sleep(0)


async def test_slots_are_taken_until_none_is_free() -> None:
    slots = Slots(2)
    assert [slots.try_take() for _ in range(3)] == [True, True, False]
    slots.give_back()
    assert [slots.try_take() for _ in range(2)] == [True, False]


async def test_slots_go_to_waiting_requests_in_order_of_arrival() -> None:
    slots, taken = Slots(1), list[int]()
    assert slots.try_take()
    tasks = [asyncio.create_task(waiting(slots, taken, number)) for number in range(2)]
    await turn()
    slots.give_back()
    # The slot belongs to the first one already, although it has not run yet.
    assert not slots.try_take()
    await turn()
    assert taken == [0]
    slots.give_back()
    await asyncio.gather(*tasks)
    assert taken == [0, 1]
    slots.give_back()
    assert slots.try_take()


async def test_slots_skip_a_request_that_no_longer_waits() -> None:
    slots, taken = Slots(1), list[int]()
    assert slots.try_take()
    gone, other = (asyncio.create_task(waiting(slots, taken, number)) for number in range(2))
    await turn()
    gone.cancel()
    await turn()
    slots.give_back()
    await other
    assert taken == [1]


async def test_slots_get_back_that_of_a_request_cancelled_with_it() -> None:
    slots = Slots(1)
    assert slots.try_take()
    task = asyncio.create_task(slots.wait())
    await turn()
    slots.give_back()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert slots.try_take()
