"""Dynamic batching: calls that arrive within a millisecond or so of each other are computed together.

One batch runs at a time, in one worker thread, so that the event loop keeps answering; what arrives meanwhile
forms the next batch. The queue is bounded in inputs. A call whose deadline has passed, or whose caller has
left, is never computed.
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


class QueueFull(Exception):  # noqa: N818 - it names what happened
    """More inputs are waiting than the queue may hold."""


class DeadlinePassed(Exception):  # noqa: N818 - it names what happened
    """The call's deadline came before its answer."""


@dataclass(slots=True, frozen=True)
class BatchLimits:
    """How calls are gathered.

    ``window_s``: how long an idle batcher waits for company, once calls come closer together than that.
    ``max_batch`` and ``max_waiting`` count inputs; a call is never split, so a call larger than ``max_batch`` is a
    batch of its own.
    """

    window_s: float = 0.001
    max_batch: int = 64
    max_waiting: int = 2048


@dataclass(slots=True)
class _Call(Generic[In, Out]):
    inputs: Sequence[In]
    deadline: float | None
    answer: asyncio.Future[list[Out]]


class Batcher(Generic[In, Out]):
    """Feeds ``compute`` (called in a thread, one result an input, in order) with batches of inputs.

    ``on_batch`` hears each batch's size in inputs. Use between `start` and `stop`, on one event loop.
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
        self._latest, self._latest_gap = -math.inf, math.inf
        self.waiting = 0
        """Inputs in the queue, not yet in a batch."""

    async def start(self) -> None:
        """Begin to serve."""
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="predict")
        self._loop_task = asyncio.create_task(self._run(self._thread))

    async def stop(self) -> None:
        """End; calls still waiting are cancelled. Idempotent."""
        if self._loop_task is not None:
            self._loop_task.cancel()
            with suppress(asyncio.CancelledError):
                await self._loop_task
            self._loop_task = None
        for call in self._calls:
            call.answer.cancel()
        self._calls.clear()
        self.waiting = 0
        if self._thread is not None:
            self._thread.shutdown(wait=False)
            self._thread = None

    async def submit(self, inputs: Sequence[In], timeout_s: float | None = None) -> list[Out]:
        """One result an input, in order, within ``timeout_s`` seconds.

        Raises `QueueFull` at once, `DeadlinePassed` on time, and whatever ``compute`` raised.
        """
        if timeout_s is not None and timeout_s <= 0:
            raise DeadlinePassed
        if self.waiting + len(inputs) > self._limits.max_waiting:
            raise QueueFull
        loop = asyncio.get_running_loop()
        deadline = None if timeout_s is None else loop.time() + timeout_s
        call: _Call[In, Out] = _Call(inputs, deadline, loop.create_future())
        now = loop.time()
        self._latest_gap, self._latest = now - self._latest, now
        self._calls.append(call)
        self.waiting += len(inputs)
        self._arrived.set()
        if deadline is None:
            return await call.answer
        try:
            # The future is cancelled at the deadline, and `_next_batch` drops what is done.
            async with asyncio.timeout_at(deadline):
                return await call.answer
        except TimeoutError:
            raise DeadlinePassed from None

    async def _run(self, thread: ThreadPoolExecutor) -> None:
        loop = asyncio.get_running_loop()
        while True:
            if not self._calls:
                self._arrived.clear()
                await self._arrived.wait()
                # Only an idle batcher waits: under load the previous batch's run time was window enough. And only
                # where calls come in quick succession: a lone one has no company to wait for.
                if self._latest_gap < self._limits.window_s and self.waiting < self._limits.max_batch:
                    await asyncio.sleep(self._limits.window_s)
            batch = self._next_batch(loop.time())
            if not batch:
                continue
            inputs = [one for call in batch for one in call.inputs]
            self._on_batch(len(inputs))
            try:
                results = await loop.run_in_executor(thread, self._compute, inputs)
            except asyncio.CancelledError:
                for call in batch:
                    call.answer.cancel()
                raise
            except Exception as error:  # belongs to the callers, the loop goes on
                for call in batch:
                    if not call.answer.done():
                        call.answer.set_exception(error)
                continue
            at = 0
            for call in batch:
                if not call.answer.done():
                    call.answer.set_result(results[at : at + len(call.inputs)])
                at += len(call.inputs)

    def _next_batch(self, now: float) -> list[_Call[In, Out]]:
        batch: list[_Call[In, Out]] = []
        size = 0
        while self._calls and (not batch or size + len(self._calls[0].inputs) <= self._limits.max_batch):
            call = self._calls.popleft()
            self.waiting -= len(call.inputs)
            if call.answer.done():
                continue
            if call.deadline is not None and now >= call.deadline:
                call.answer.set_exception(DeadlinePassed())
                continue
            batch.append(call)
            size += len(call.inputs)
        return batch
