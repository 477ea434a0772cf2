"""Dynamic batching: calls that arrive within about a millisecond of each other are computed together.

One batch runs at a time, in a worker thread, so that the event loop stays responsive. Calls that arrive meanwhile form
the next batch. The queue is bounded in inputs. A call is skipped if its deadline has passed or its caller has left.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Generic, TypeVar

In = TypeVar("In")
Out = TypeVar("Out")


class QueueFull(Exception):  # noqa: N818
    """The queue has no room for these inputs."""


class DeadlinePassed(Exception):  # noqa: N818
    """The deadline of the call passed before its result was ready."""


@dataclass(slots=True, frozen=True)
class BatchLimits:
    """Limits of batches and queue.

    ``window_s``: seconds that an idle batcher waits for further calls, if calls arrive more often than that.
    ``max_batch``: inputs in one batch. Calls are never split, so that a larger call is a batch by itself.
    ``max_waiting``: inputs in the queue.
    """

    window_s: float = 0.001
    max_batch: int = 64
    max_waiting: int = 2048


@dataclass(slots=True)
class _Call(Generic[In, Out]):
    inputs: Sequence[In]
    deadline: float | None
    result: asyncio.Future[list[Out]]


class Batcher(Generic[In, Out]):
    """Calls ``compute`` with batches of inputs.

    ``compute`` runs in a worker thread and returns one result for each input, in order. ``on_batch`` is called with the
    number of inputs of each batch. `submit` works between `start` and `stop`, on one event loop.
    """

    def __init__(
        self,
        compute: Callable[[list[In]], list[Out]],
        limits: BatchLimits | None = None,
        on_batch: Callable[[int], None] = lambda size: None,
    ) -> None:
        self._compute, self._limits, self._on_batch = compute, limits or BatchLimits(), on_batch
        self._calls: deque[_Call[In, Out]] = deque()
        self._arrived = asyncio.Event()
        self._thread: ThreadPoolExecutor | None = None
        self._loop_task: asyncio.Task[None] | None = None
        self._last_arrival, self._last_gap = -math.inf, math.inf
        self.waiting = 0
        """Inputs in the queue that are not yet in a batch."""

    async def start(self) -> None:
        """Start the worker."""
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="predict")
        self._loop_task = asyncio.create_task(self._run(self._thread))

    async def stop(self) -> None:
        """Stop the worker and cancel queued calls. Idempotent."""
        if self._loop_task is not None:
            self._loop_task.cancel()
            with suppress(asyncio.CancelledError):
                await self._loop_task
            self._loop_task = None
        for call in self._calls:
            call.result.cancel()
        self._calls.clear()
        self.waiting = 0
        if self._thread is not None:
            self._thread.shutdown(wait=False)
            self._thread = None

    async def submit(self, inputs: Sequence[In], timeout_s: float | None = None) -> list[Out]:
        """Return one result for each input, in order.

        Raises:
            QueueFull: immediately, without room in the queue.
            DeadlinePassed: after ``timeout_s`` seconds.
            Exception: whatever ``compute`` raised.
        """
        if timeout_s is not None and timeout_s <= 0:
            raise DeadlinePassed
        if self.waiting + len(inputs) > self._limits.max_waiting:
            raise QueueFull
        loop = asyncio.get_running_loop()
        deadline = None if timeout_s is None else loop.time() + timeout_s
        call: _Call[In, Out] = _Call(inputs, deadline, loop.create_future())
        now = loop.time()
        self._last_gap, self._last_arrival = now - self._last_arrival, now
        self._calls.append(call)
        self.waiting += len(inputs)
        self._arrived.set()
        if deadline is None:
            return await call.result
        try:
            # The timeout cancels the future, and `_next_batch` skips calls that are done.
            async with asyncio.timeout_at(deadline):
                return await call.result
        except TimeoutError:
            raise DeadlinePassed from None

    async def _run(self, thread: ThreadPoolExecutor) -> None:
        loop = asyncio.get_running_loop()
        while True:
            if not self._calls:
                self._arrived.clear()
                await self._arrived.wait()
                # Only an idle batcher waits: under load, calls gather while the previous batch runs. A call that comes
                # alone does not wait either.
                if self._last_gap < self._limits.window_s and self.waiting < self._limits.max_batch:
                    await asyncio.sleep(self._limits.window_s)
            batch = self._next_batch(loop.time())
            if not batch:
                continue
            inputs = [value for call in batch for value in call.inputs]
            self._on_batch(len(inputs))
            try:
                results = await loop.run_in_executor(thread, self._compute, inputs)
            except asyncio.CancelledError:
                for call in batch:
                    call.result.cancel()
                raise
            except Exception as error:  # the callers raise it; this loop continues
                for call in batch:
                    if not call.result.done():
                        call.result.set_exception(error)
                continue
            at = 0
            for call in batch:
                if not call.result.done():
                    call.result.set_result(results[at : at + len(call.inputs)])
                at += len(call.inputs)

    def _next_batch(self, now: float) -> list[_Call[In, Out]]:
        batch: list[_Call[In, Out]] = []
        size = 0
        while self._calls and (not batch or size + len(self._calls[0].inputs) <= self._limits.max_batch):
            call = self._calls.popleft()
            self.waiting -= len(call.inputs)
            if call.result.done():
                continue
            if call.deadline is not None and now >= call.deadline:
                call.result.set_exception(DeadlinePassed())
                continue
            batch.append(call)
            size += len(call.inputs)
        return batch
