import asyncio
import threading
import time

import pytest

from predictor_service.serving.batching import Batcher, BatchLimits, DeadlinePassed, QueueFull


def double(inputs: list[int]) -> list[int]:
    return [2 * x for x in inputs]


class Running:
    """A started batcher for the length of a ``with``."""

    def __init__(self, compute=double, **limits):
        self.sizes: list[int] = []
        self.batcher = Batcher(compute, BatchLimits(**limits), self.sizes.append)

    async def __aenter__(self):
        await self.batcher.start()
        return self.batcher

    async def __aexit__(self, *error):
        await self.batcher.stop()


class Held:
    """A computation that waits until it is let go, and notes what it was asked."""

    def __init__(self):
        self.go, self.asked = threading.Event(), []

    def __call__(self, inputs: list[int]) -> list[int]:
        self.asked += inputs
        assert self.go.wait(5)
        return double(inputs)


async def until(condition) -> None:
    for _ in range(500):
        if condition():
            return
        await asyncio.sleep(0.002)
    raise AssertionError("did not happen")


async def test_concurrent_calls_are_computed_together_and_answered_apart():
    running = Running(window_s=0.02)
    async with running as batcher:
        answers = await asyncio.gather(*(batcher.submit([n, n + 100]) for n in range(10)))
    assert answers == [[2 * n, 2 * n + 200] for n in range(10)]
    assert running.sizes == [20]


async def test_a_lone_call_waits_for_nobody():
    async with Running(window_s=5.0) as batcher:
        async with asyncio.timeout(1):
            assert await batcher.submit([1]) == [2]


async def test_a_batch_is_bounded_and_a_call_is_never_split():
    running = Running(window_s=0.02, max_batch=4)
    async with running as batcher:
        await asyncio.gather(*(batcher.submit([1] * n) for n in (3, 2, 2, 9, 1)))
    assert running.sizes == [3, 4, 9, 1]


async def test_a_full_queue_refuses_at_once():
    held = Held()
    async with Running(held, window_s=0.0, max_waiting=4) as batcher:
        first = asyncio.create_task(batcher.submit([0]))
        await until(lambda: held.asked)
        waiting = asyncio.create_task(batcher.submit([1, 2, 3]))
        await until(lambda: batcher.waiting == 3)
        with pytest.raises(QueueFull):
            await batcher.submit([4, 5])
        held.go.set()
        assert await waiting == [2, 4, 6]
        assert await first == [0]
    assert batcher.waiting == 0


async def test_a_deadline_is_kept_and_the_call_is_never_computed():
    held = Held()
    async with Running(held, window_s=0.0) as batcher:
        first = asyncio.create_task(batcher.submit([0]))
        await until(lambda: held.asked)
        began = time.monotonic()
        with pytest.raises(DeadlinePassed):
            await batcher.submit([1], timeout_s=0.03)
        assert time.monotonic() - began < 0.5
        held.go.set()
        await first
        assert await batcher.submit([2]) == [4]
    assert held.asked == [0, 2]


async def test_a_deadline_already_passed_is_refused_at_once():
    async with Running() as batcher:
        with pytest.raises(DeadlinePassed):
            await batcher.submit([1], timeout_s=0.0)


async def test_a_caller_that_leaves_costs_nothing():
    held = Held()
    async with Running(held, window_s=0.0) as batcher:
        first = asyncio.create_task(batcher.submit([0]))
        await until(lambda: held.asked)
        gone = asyncio.create_task(batcher.submit([1]))
        await until(lambda: batcher.waiting == 1)
        gone.cancel()
        held.go.set()
        await first
        await until(lambda: batcher.waiting == 0)
    assert held.asked == [0]


async def test_a_failed_batch_fails_its_calls_and_the_next_one_works():
    def picky(inputs: list[int]) -> list[int]:
        if 13 in inputs:
            raise ZeroDivisionError
        return double(inputs)

    async with Running(picky, window_s=0.0) as batcher:
        with pytest.raises(ZeroDivisionError):
            await batcher.submit([13])
        assert await batcher.submit([1]) == [2]


async def test_stopping_cancels_whoever_waits():
    held = Held()
    running = Running(held, window_s=0.0)
    async with running as batcher:
        calls = [asyncio.create_task(batcher.submit([n])) for n in range(3)]
        await until(lambda: held.asked)
    held.go.set()
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert all(isinstance(result, asyncio.CancelledError) for result in results)
