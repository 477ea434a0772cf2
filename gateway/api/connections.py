"""The client connections of the HTTP server: how many may be open, and which of them are cut."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
from collections import Counter
from collections.abc import Callable
from types import ModuleType
from typing import Protocol

from gateway.api.errors import ApiError, retry_headers, unavailable
from gateway.api.limits import Limits
from gateway.api.shared_limit import Sharer
from gateway.api.start_queue import StartQueue

resource: ModuleType | None
try:
    import resource
except ImportError:  # Windows has no such limits.
    resource = None

log = logging.getLogger("antares.connections")

CONNECTION_KEY = "antares.connection"
"""ASGI scope key of the `Connection` that received the request."""

SLOW_READER_REASONS = frozenset(("slow_reader", "response_memory"))
"""Reasons for which a connection is cut because its client does not read."""

SWEEP_S = 0.5
"""Interval (s) at which time limits are checked, so a connection is cut this much later at most. Convention."""

LOGGED_S = 10.0
"""Shortest time (s) between two log lines about connections that were cut. An abuser causes thousands."""

RETRY_S = 2.0
"""``Retry-After`` (s) of a connection that is refused. Idle connections close within seconds. Convention."""

MOST_DERIVED = 16_384
"""Limit on connections that follows from the descriptors at most. Each idle one costs about 20 KiB. Convention."""

OWN_DESCRIPTORS = 64
"""Descriptors that the process needs besides its connections to clients and engines: about 30 are open at start."""


class Connection(Protocol):
    """What `Connections` needs of a server's connection."""

    address: str
    is_shared: bool
    sharer: Sharer

    @property
    def is_idle(self) -> bool:
        """Whether no request is in flight, and nothing waits for the client."""

    @property
    def buffered(self) -> int:
        """Bytes that wait for the client."""

    @property
    def behind_since(self) -> float:
        """When the client was first seen with the data that waits for it (monotonic s); 0 if none waits."""

    def overdue(self, now: float) -> str:
        """Return the time limit that the client exceeds at ``now``; "" if none."""

    def cut(self, reason: str) -> None:
        """Close the connection because of ``reason``."""

    def give_up_body(self) -> None:
        """Close the connection after the response if the body has not arrived by then."""


class Connections:
    """Counts connections, refuses new ones above a limit, and closes slow ones and ones that hold too much memory.

    Args:
        limits: the limits.
        max_connections: connections in total, unless ``limits`` says.
        on_closed: called with the reason of every connection that the gateway closes on its own.
    """

    def __init__(
        self,
        limits: Limits | None = None,
        max_connections: int = MOST_DERIVED,
        on_closed: Callable[[str], None] = lambda reason: None,
    ) -> None:
        self._derived = max_connections
        self.set_limits(limits or Limits())
        self.buffered = 0
        self.starts = StartQueue()
        self._on_closed = on_closed
        # Insertion order is age.
        self._open: dict[Connection, None] = {}
        self._by_address: dict[str, dict[Connection, None]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._unlogged: Counter[str] = Counter()
        self._logged_at = float("-inf")

    def set_limits(self, limits: Limits) -> None:
        """Replace the limits. Open connections keep the sizes and times with which they were opened."""
        self.limits = limits
        self.max_connections = limits.max_connections or self._derived
        self.per_client = limits.max_connections_per_client or max(1, self.max_connections * 3 // 4)
        self._trusted = [ipaddress.ip_network(network, strict=False) for network in limits.trusted_proxies]

    def __len__(self) -> int:
        return len(self._open)

    def add(self, connection: Connection) -> ApiError | None:
        """Count a new connection. Return the error response if it is refused.

        At a limit, the oldest idle connection is closed to make room: first one of the same client, and in total one of
        the client that has the most connections.
        """
        own = self._by_address.get(connection.address, {})
        if len(own) >= self.per_client and not self._is_trusted(connection.address) and not self._make_room(own):
            self.closed("client_limit")
            return _too_many(f"More than {self.per_client} connections from this address.", 429)
        if len(self._open) >= self.max_connections:
            largest = max(self._by_address.values(), key=len)
            if not (self._make_room(largest) or self._make_room(self._open)):
                self.closed("connection_limit")
                return _too_many("The gateway has too many open connections.", 503)
        self._open[connection] = None
        self._by_address.setdefault(connection.address, {})[connection] = None
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(SWEEP_S, self._sweep)
        return None

    def remove(self, connection: Connection) -> None:
        """Forget a connection that is closed. Idempotent."""
        self._open.pop(connection, None)
        own = self._by_address.get(connection.address)
        if own is not None:
            own.pop(connection, None)
            if not own:
                del self._by_address[connection.address]

    def closed(self, reason: str) -> None:
        """Count a connection that the gateway closes on its own, and log such ones from time to time."""
        self._on_closed(reason)
        self._unlogged[reason] += 1
        now = asyncio.get_running_loop().time()
        if now >= self._logged_at + LOGGED_S:
            self._logged_at = now
            counts = ", ".join(f"{count} {name}" for name, count in self._unlogged.most_common())
            log.warning("closed connections: %s; %d of at most %d are open", counts, len(self), self.max_connections)
            self._unlogged.clear()

    def cut_all(self) -> None:
        """Cut every connection."""
        for connection in list(self._open):
            connection.cut("shutdown")

    def _make_room(self, candidates: dict[Connection, None]) -> bool:
        """Close the oldest idle connection of ``candidates``. Return False if none is idle."""
        idle = next((connection for connection in candidates if connection.is_idle), None)
        if idle is None:
            return False
        idle.cut("connection_limit")
        self.remove(idle)
        return True

    def is_shared(self, address: str) -> bool:
        """Whether ``address`` is this machine, or has many clients behind it."""
        return address.startswith("127.") or address == "::/64" or self._is_trusted(address)

    def _is_trusted(self, address: str) -> bool:
        """Whether ``address`` has no limit of its own: the configuration lists it, or it is empty."""
        if not address:
            return True
        if not self._trusted:
            return False
        client = ipaddress.ip_network(address)
        return any(
            client.version == network.version and client.subnet_of(network)  # type: ignore[arg-type]
            for network in self._trusted
        )

    def _sweep(self) -> None:
        loop = asyncio.get_running_loop()
        now = loop.time()
        behind = []
        for connection in list(self._open):
            if reason := connection.overdue(now):
                connection.cut(reason)
            elif connection.buffered:
                behind.append(connection)
        self.buffered = sum(connection.buffered for connection in behind)
        if self.buffered > self.limits.response_memory_bytes:
            self._free_buffers(behind)
        self._timer = loop.call_later(SWEEP_S, self._sweep) if self._open else None

    def _free_buffers(self, behind: list[Connection]) -> None:
        """Cut connections until the responses that wait fit: that of the tenant with most, behind for longest."""
        behind.sort(key=lambda connection: connection.behind_since, reverse=True)
        of_sharer: dict[str, list[Connection]] = {}
        size: Counter[str] = Counter()
        weight: dict[str, float] = {}
        for connection in behind:
            name = connection.sharer.name or connection.address
            of_sharer.setdefault(name, []).append(connection)
            size[name] += connection.buffered
            weight[name] = connection.sharer.weight
        while self.buffered > self.limits.response_memory_bytes:
            largest = max(size, key=lambda name: size[name] / weight[name])
            connection = of_sharer[largest].pop()
            size[largest] -= connection.buffered
            self.buffered -= connection.buffered
            connection.cut("response_memory")


def client_address(address: str | None) -> str:
    """Return what counts as one client: an IPv4 address or an IPv6 /64 network; "" if there is no address."""
    if not address:
        return ""
    if ":" not in address:
        return address
    try:
        parsed = ipaddress.IPv6Address(address)
    except ValueError:
        return address
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return str(ipaddress.IPv6Network((parsed, 64), strict=False))


def connections_for(descriptors: int, engine_connections: int) -> int:
    """Return how many connections of clients fit into ``descriptors``, beside those to engines."""
    reserved = min(OWN_DESCRIPTORS + engine_connections, descriptors // 2)
    return max(1, min(MOST_DERIVED, descriptors - reserved))


def descriptor_limit() -> int:
    """Return how many descriptors the process may open."""
    if resource is None:
        return 2 * MOST_DERIVED
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 2 * MOST_DERIVED if soft == resource.RLIM_INFINITY else soft


def raise_descriptor_limit() -> None:
    """Raise the soft limit on descriptors to the hard limit."""
    if resource is not None:
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        # macOS reports an unlimited hard limit, and allows less.
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _too_many(message: str, status: int) -> ApiError:
    if status == 503:
        return unavailable(message, "too_many_connections", RETRY_S)
    return ApiError(status, message, "rate_limit_error", "too_many_connections", headers=retry_headers(RETRY_S))
