"""Limits on what one client can make the gateway hold: memory, connections and time (docs/limits.md)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True, frozen=True)
class Limits:
    """Limits of the HTTP edge. Sizes are in bytes, times in seconds.

    Attributes:
        max_head_bytes: largest request head. Also bounds chunk extensions and trailers.
        head_timeout_s: time for a request head, and for the first byte of a new connection.
        idle_timeout_s: time that a connection may stay open between two requests.
        stall_s: time in which a client must move ``min_bytes_per_s`` on average, while data of its request or of its
            response is due. Also the time in total that a client may make an engine wait for it.
        min_bytes_per_s: slowest client.
        response_buffer_bytes: data of one response that waits for its client.
        response_memory_bytes: the same for all responses together.
        body_memory_bytes: request bodies of all open requests together.
        max_connections_per_client: connections from one address; None allows three quarters of all.
        trusted_proxies: addresses without that limit, since many clients share them.
    """

    max_head_bytes: int = 64 << 10
    head_timeout_s: float = 15.0
    idle_timeout_s: float = 75.0
    stall_s: float = 30.0
    min_bytes_per_s: int = 1024
    response_buffer_bytes: int = 8 << 20
    response_memory_bytes: int = 256 << 20
    body_memory_bytes: int = 512 << 20
    max_connections: int | None = None
    max_connections_per_client: int | None = None
    trusted_proxies: tuple[str, ...] = ()

    @property
    def bytes_per_stall(self) -> float:
        """Bytes that a client must move within ``stall_s``."""
        return self.min_bytes_per_s * self.stall_s
