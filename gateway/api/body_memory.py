"""Bounds the memory of all request bodies together, while they are received and while their requests are open."""

from __future__ import annotations

import asyncio
import contextlib
from types import TracebackType
from typing import Self

from gateway.api.errors import ApiError, unavailable
from gateway.api.shared_limit import ONLY_SHARER, SharedLimit, Sharer

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

    __slots__ = ("_memory", "_timer", "bytes", "evicted", "sharer")

    def __init__(self, memory: BodyMemory, sharer: Sharer) -> None:
        self.bytes = 0
        self.evicted = False
        self.sharer = sharer
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

    A tenant leaves a part to the others (`SharedLimit`). If memory is short, the request whose body takes longest to
    arrive loses its memory to a request of the same tenant, or of one that holds less: half-sent bodies do not keep
    others out. Bodies are counted as they are sent; parsed, they take up to three times as much for a moment.

    ``shared``: the bytes that are reserved. ``receiving``: when each reservation began, for bodies that are incomplete.
    """

    def __init__(self, limit: int) -> None:
        self.shared = SharedLimit(limit)
        self.receiving: dict[BodyReservation, float] = {}

    @property
    def used(self) -> int:
        """Bytes that are reserved."""
        return self.shared.used

    def reservation(self, sharer: Sharer = ONLY_SHARER) -> BodyReservation:
        """Return the reservation of a new request of ``sharer``, which is empty."""
        return BodyReservation(self, sharer)

    async def take(self, reservation: BodyReservation, count: int) -> None:
        """Add ``count`` bytes to ``reservation``, in the order of arrival of its tenant's requests.

        Raises `ApiError` 503 after `WAIT_S`.
        """
        sharer = reservation.sharer
        if not self.shared.try_take(sharer, count):
            # Its body waits for the gateway now, not for the client.
            self.receiving.pop(reservation, None)
            try:
                async with asyncio.timeout(WAIT_S), self.shared.turn(sharer):
                    await self._make_room(sharer, count)
                    self.shared.take(sharer, count)
            except TimeoutError:
                raise no_memory(of_tenant=self.shared.has_room(count)) from None
        reservation.bytes += count

    async def _make_room(self, sharer: Sharer, count: int) -> None:
        loop = asyncio.get_running_loop()
        while not self.shared.fits(sharer, count):
            self._evict(sharer, count, loop.time())
            with contextlib.suppress(TimeoutError):
                # Not for long, since another body may be slow enough by then.
                async with asyncio.timeout(_RETRY_INTERVAL_S):
                    await self.shared.until_freed()

    def _evict(self, sharer: Sharer, count: int, now: float) -> None:
        """End the reception of the slowest bodies, so that ``count`` bytes fit."""
        shared, freed, own = self.shared, 0, 0
        level = shared.level(sharer, count)
        for slow, since in list(self.receiving.items()):
            if now < since + UPLOAD_S or shared.fits(sharer, count, freed=freed, own=own):
                return
            if slow.sharer.name == sharer.name:
                own += slow.bytes
            elif shared.level(slow.sharer) <= level:
                continue
            freed += slow.bytes
            del self.receiving[slow]
            slow.evict(now)

    def free(self, reservation: BodyReservation, count: int) -> None:
        """Take back ``count`` bytes."""
        if not reservation.bytes:
            self.receiving.pop(reservation, None)
        self.shared.free(reservation.sharer, count)


def no_memory(of_tenant: bool = False) -> ApiError:
    """503: other requests take all memory, or the tenant's others take its part (``of_tenant``)."""
    what = "Other requests of this tenant take" if of_tenant else "The gateway holds too many large request bodies:"
    end = " its part of limits.body_memory_bytes." if of_tenant else " limits.body_memory_bytes is in use."
    return unavailable(what + end, "body_memory_full", RETRY_S)
