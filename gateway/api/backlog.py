"""How fast a client takes the response data that waits for it."""

from __future__ import annotations

import asyncio
import socket
import struct

from gateway.api.limits import Limits

# Offset and size of `tcpi_bytes_acked` in Linux's `struct tcp_info`.
_TCP_INFO = getattr(socket, "TCP_INFO", None)
_ACKED_AT, _TCP_INFO_BYTES = 120, 128


class Backlog:
    """The data that waits for the client behind ``transport``.

    ``since``: when the client was first seen with the present backlog (monotonic s); 0 without one.
    """

    __slots__ = ("_last_bytes", "_mark_at", "_mark_bytes", "_taken", "_transport", "since")

    def __init__(self, transport: asyncio.Transport) -> None:
        self.since = 0.0
        self._transport = transport
        self._mark_at = self._mark_bytes = 0.0
        self._taken = self._last_bytes = 0

    @property
    def bytes(self) -> int:
        """Bytes that wait for the client."""
        return self._transport.get_write_buffer_size()

    def is_stalled(self, now: float, limits: Limits) -> bool:
        """Whether the client took less than `Limits.bytes_per_stall` of it in the last `Limits.stall_s`."""
        if not self.bytes:
            self.since = 0.0
            return False
        taken = self._bytes_taken()
        if not self.since:
            self.since = now
        elif taken < self._mark_bytes + limits.bytes_per_stall:
            return now > self._mark_at + limits.stall_s
        self._mark_at, self._mark_bytes = now, taken
        return False

    def _bytes_taken(self) -> int:
        """Return the bytes that the client has acknowledged so far."""
        if _TCP_INFO is not None:
            info = self._transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, _TCP_INFO, _TCP_INFO_BYTES)
            if len(info) == _TCP_INFO_BYTES:
                return int(struct.unpack_from("Q", info, _ACKED_AT)[0])
        # Elsewhere only a backlog that shrinks is seen, which is less than what the client takes of a growing one.
        waiting = self.bytes
        self._taken += max(0, self._last_bytes - waiting)
        self._last_bytes = waiting
        return self._taken
