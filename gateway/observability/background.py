"""Work off the event loop: a bounded queue and the thread that empties it in batches."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

log = logging.getLogger("antares.observability")

COMPLAIN_EVERY_S = 60.0
"""Least seconds between two log lines about the same queue. Convention."""

T = TypeVar("T")


class BackgroundQueue(Generic[T]):
    """Passes items to ``handle`` in a thread of its own, in batches and in order.

    `put` never blocks: an item beyond ``limit`` is dropped and counted. A batch on which ``handle`` raises is dropped
    and counted too. The thread starts with the first item.

    Args:
        name: of the thread, for the log.
        handle: gets at most ``max_batch`` items. May block.
        limit: items that may wait.
        delay_s: how long the first item of a batch waits for others.
    """

    def __init__(
        self,
        name: str,
        handle: Callable[[list[T]], None],
        *,
        limit: int = 8192,
        max_batch: int = 512,
        delay_s: float = 0.2,
    ) -> None:
        self.dropped = 0
        self._name, self._handle = name, handle
        self._limit, self._max_batch, self._delay_s = limit, max_batch, delay_s
        self._items: deque[T] = deque()
        self._awake, self._closing = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        self._complained_at = -COMPLAIN_EVERY_S

    def put(self, item: T) -> None:
        """Queue ``item``, or drop it. Called by one thread."""
        if len(self._items) >= self._limit or self._closing.is_set():
            self.dropped += 1
            return
        self._items.append(item)
        if not self._awake.is_set():
            self._awake.set()
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()

    def close(self, timeout_s: float) -> bool:
        """Accept no more items, and handle the waiting ones within ``timeout_s`` seconds.

        Idempotent. Return whether all are handled.
        """
        self._closing.set()
        self._awake.set()
        if self._thread is not None:
            self._thread.join(timeout_s)
        return self._thread is None or not self._thread.is_alive()

    def _run(self) -> None:
        while not self._closing.is_set():
            self._awake.wait()
            self._closing.wait(self._delay_s)
            # Cleared before the items are taken, so that no item waits for the next one.
            self._awake.clear()
            self._empty()
        self._empty()

    def _empty(self) -> None:
        while self._items:
            batch = [self._items.popleft() for _ in range(min(len(self._items), self._max_batch))]
            try:
                self._handle(batch)
            except Exception as error:
                self.dropped += len(batch)
                self._complain(error)

    def _complain(self, error: Exception) -> None:
        now = time.monotonic()
        if now - self._complained_at >= COMPLAIN_EVERY_S:
            self._complained_at = now
            reason = error.strerror if isinstance(error, OSError) else None
            log.error("%s: %d dropped so far: %s", self._name, self.dropped, reason or type(error).__name__)
