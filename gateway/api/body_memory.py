"""Bounds the memory of all request bodies together, while they are received and while their requests are open."""

from __future__ import annotations

import asyncio
import contextlib
from types import TracebackType
from typing import Self

from gateway.api.errors import ApiError, unavailable

FREE_BYTES = 64 << 10
"""Bytes of each body that do not count, so small requests never wait. The server reads as much ahead of the gateway,
and the limit on connections bounds the sum."""

UPLOAD_S = 1.0
"""Seconds for which a body that is being received keeps its memory although other requests wait for it. Convention."""

WAIT_S = 5.0
"""Longest wait (s) of a request for the memory of its body. Convention."""

RETRY_S = 2.0
"""``Retry-After`` (s) of a request that found no memory. Convention."""

_RETRY_INTERVAL_S = 0.1


class BodyReservation:
    """The memory of one request's body, from its first bytes to the end of the request. Leave the context to free it.

    ``bytes``: what is reserved. ``evicted``: the body lost its memory while it was received.
    """

    __slots__ = ("_memory", "_timer", "bytes", "evicted")

    def __init__(self, memory: BodyMemory) -> None:
        self.bytes = 0
        self.evicted = False
        self._memory = memory
        self._timer: asyncio.Timeout | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.bytes:
            self.shrink(0)

    async def grow(self, size: int, receiving: asyncio.Timeout | None = None) -> None:
        """Reserve memory for a body of ``size`` bytes, or keep what is reserved if that is more.

        ``receiving``: the timer of the reader, which expires at once if the body loses its memory. Raises `ApiError`
        503 after `WAIT_S` without memory.
        """
        missing = size - FREE_BYTES - self.bytes
        if missing > 0:
            await self._memory.take(self, missing)
        self._timer = receiving
        if receiving is None:
            self._memory.receiving.pop(self, None)
        elif self.bytes:
            self._memory.receiving.setdefault(self, asyncio.get_running_loop().time())

    def received(self, size: int) -> None:
        """Note that the body is complete, with ``size`` bytes."""
        self._memory.receiving.pop(self, None)
        self.shrink(size)

    def shrink(self, size: int) -> None:
        """Free what a body of ``size`` bytes does not need."""
        surplus = self.bytes - max(0, size - FREE_BYTES)
        if surplus > 0:
            self.bytes -= surplus
            self._memory.free(self, surplus)

    def evict(self, now: float) -> None:
        """End the reception of the body."""
        self.evicted = True
        if self._timer is not None:
            self._timer.reschedule(now)


class BodyMemory:
    """The memory that all request bodies share. Small bodies need none of it (`FREE_BYTES`).

    If it is full, the request whose body takes longest to arrive loses its memory: half-sent bodies do not keep others
    out. Bodies are counted as they are sent; parsed, they take up to three times as much for a moment.

    ``used``: bytes that are reserved. ``receiving``: when each reservation began, for bodies that are incomplete.
    """

    def __init__(self, limit: int) -> None:
        self.used = 0
        self.receiving: dict[BodyReservation, float] = {}
        self.limit = limit
        self._turn = asyncio.Lock()
        self._freed = asyncio.Event()

    def reservation(self) -> BodyReservation:
        """Return the reservation of a new request, which is empty."""
        return BodyReservation(self)

    async def take(self, reservation: BodyReservation, count: int) -> None:
        """Add ``count`` bytes to ``reservation``, in order of arrival. Raises `ApiError` 503 after `WAIT_S`."""
        if self.used + count > self.limit or self._turn.locked():
            # Its body waits for the gateway now, not for the client.
            self.receiving.pop(reservation, None)
            try:
                async with asyncio.timeout(WAIT_S), self._turn:
                    await self._make_room(count)
            except TimeoutError:
                raise no_memory() from None
        self.used += count
        reservation.bytes += count

    async def _make_room(self, count: int) -> None:
        loop = asyncio.get_running_loop()
        while self.used + count > self.limit:
            now, missing = loop.time(), self.used + count - self.limit
            for slow, since in list(self.receiving.items()):
                if missing <= 0 or now < since + UPLOAD_S:
                    break
                missing -= slow.bytes
                del self.receiving[slow]
                slow.evict(now)
            self._freed.clear()
            with contextlib.suppress(TimeoutError):
                # Not for long, since another body may be slow enough by then.
                async with asyncio.timeout(_RETRY_INTERVAL_S):
                    await self._freed.wait()

    def free(self, reservation: BodyReservation, count: int) -> None:
        """Take back ``count`` bytes."""
        self.used -= count
        if not reservation.bytes:
            self.receiving.pop(reservation, None)
        self._freed.set()


def no_memory() -> ApiError:
    """503: the bodies of other requests take all memory."""
    return unavailable("The gateway holds too many large request bodies.", "body_memory_full", RETRY_S)
