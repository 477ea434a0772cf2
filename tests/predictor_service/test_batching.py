import asyncio
import threading
import time

import pytest

from predictor_service.serving.batching import Batcher, BatchLimits, DeadlinePassed, QueueFull


def double(inputs: list[int]) -> list[int]:
    return [2 * x for x in inputs]


class StartedBatcher:
    """Starts a batcher on entry and stops it on exit; ``sizes`` holds the batch sizes."""

    def __init__(self, compute=double, **limits):
        self.sizes: list[int] = []
        self.batcher = Batcher(compute, BatchLimits(**limits), self.sizes.append)

    async def __aenter__(self):
        await self.batcher.start()
        return self.batcher

    async def __aexit__(self, *error):
        await self.batcher.stop()


class BlockedCompute:
    """A computation that blocks wait_until `release` is set, and records its inputs."""

    def __init__(self):
        self.release, self.inputs = threading.Event(), []

    def __call__(self, inputs: list[int]) -> list[int]:
        self.inputs += inputs
        assert self.release.wait(30)
        return double(inputs)


async def wait_until(condition) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.002)


async def test_batcher_computes_concurrent_calls_in_one_batch():
    started_batcher = StartedBatcher(window_s=0.02)
    async with started_batcher as batcher:
        answers = await asyncio.gather(*(batcher.submit([n, n + 100]) for n in range(10)))
    assert answers == [[2 * n, 2 * n + 200] for n in range(10)]
    assert started_batcher.sizes == [20]


async def test_batcher_does_not_delay_single_call():
    async with StartedBatcher(window_s=60.0) as batcher:
        async with asyncio.timeout(30):
            assert await batcher.submit([1]) == [2]


async def test_batcher_bounds_batches_and_never_splits_calls():
    started_batcher = StartedBatcher(window_s=0.02, max_batch=4)
    async with started_batcher as batcher:
        await asyncio.gather(*(batcher.submit([1] * n) for n in (3, 2, 2, 9, 1)))
    assert started_batcher.sizes == [3, 4, 9, 1]


async def test_batcher_rejects_call_when_queue_is_full():
    blocked = BlockedCompute()
    async with StartedBatcher(blocked, window_s=0.0, max_waiting=4) as batcher:
        first = asyncio.create_task(batcher.submit([0]))
        await wait_until(lambda: blocked.inputs)
        waiting = asyncio.create_task(batcher.submit([1, 2, 3]))
        await wait_until(lambda: batcher.waiting == 3)
        with pytest.raises(QueueFull):
            await batcher.submit([4, 5])
        blocked.release.set()
        assert await waiting == [2, 4, 6]
        assert await first == [0]
    assert batcher.waiting == 0


async def test_batcher_times_out_and_skips_expired_call():
    blocked = BlockedCompute()
    async with StartedBatcher(blocked, window_s=0.0) as batcher:
        first = asyncio.create_task(batcher.submit([0]))
        await wait_until(lambda: blocked.inputs)
        started = time.monotonic()
        with pytest.raises(DeadlinePassed):
            await batcher.submit([1], timeout_s=0.03)
        assert time.monotonic() - started < 5
        blocked.release.set()
        await first
        assert await batcher.submit([2]) == [4]
    assert blocked.inputs == [0, 2]


async def test_batcher_rejects_call_with_expired_deadline():
    async with StartedBatcher() as batcher:
        with pytest.raises(DeadlinePassed):
            await batcher.submit([1], timeout_s=0.0)


async def test_batcher_skips_cancelled_call():
    blocked = BlockedCompute()
    async with StartedBatcher(blocked, window_s=0.0) as batcher:
        first = asyncio.create_task(batcher.submit([0]))
        await wait_until(lambda: blocked.inputs)
        left = asyncio.create_task(batcher.submit([1]))
        await wait_until(lambda: batcher.waiting == 1)
        left.cancel()
        blocked.release.set()
        await first
        await wait_until(lambda: batcher.waiting == 0)
    assert blocked.inputs == [0]


async def test_batcher_continues_after_failed_batch():
    def fail_on_13(inputs: list[int]) -> list[int]:
        if 13 in inputs:
            raise ZeroDivisionError
        return double(inputs)

    async with StartedBatcher(fail_on_13, window_s=0.0) as batcher:
        with pytest.raises(ZeroDivisionError):
            await batcher.submit([13])
        assert await batcher.submit([1]) == [2]


async def test_batcher_stop_cancels_queued_calls():
    blocked = BlockedCompute()
    started_batcher = StartedBatcher(blocked, window_s=0.0)
    async with started_batcher as batcher:
        calls = [asyncio.create_task(batcher.submit([n])) for n in range(3)]
        await wait_until(lambda: blocked.inputs)
    blocked.release.set()
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert all(isinstance(result, asyncio.CancelledError) for result in results)
