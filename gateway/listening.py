"""The socket that the gateway listens on."""

from __future__ import annotations

import socket
import sys

KEEPALIVE_IDLE_S, KEEPALIVE_INTERVAL_S, KEEPALIVE_PROBES = 60, 15, 4
"""TCP keep-alive of client connections: two minutes without a response close the connection of a dead client."""


class ServeError(Exception):
    """The gateway cannot start; the message says what to fix."""


def listen(host: str, port: int, *, shared: bool = False) -> socket.socket:
    """Return a socket bound to ``host`` and ``port`` (0: any free port). Raises `ServeError`.

    ``shared``: other processes may listen there too; the kernel gives each connection to one of them.
    """
    # Other systems cannot share a port, or give all of its connections to one process.
    if shared and sys.platform != "linux":
        raise ServeError("server.processes: only Linux divides the connections of a port among processes; use 1")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # NOTE: asyncio sets TCP_NODELAY only on sockets created with an explicit protocol. Without it, Nagle's algorithm
    # delays each small stream event by up to 40 ms, until the client acknowledges the previous one.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if shared:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    _keep_alive(listener)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise ServeError(
            f"cannot listen on {host}:{port}: {error.strerror}. Choose another server.port or set ANTARES_PORT."
        ) from error
    return listener


def url(host: str, port: int) -> str:
    """Return the URL by which clients on this machine reach a socket that listens on ``host``."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _keep_alive(listener: socket.socket) -> None:
    """Enable TCP keep-alive. Accepted sockets inherit these options."""
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    # Platforms without these options use their own times, often hours.
    for name, value in (
        ("TCP_KEEPIDLE", KEEPALIVE_IDLE_S),
        ("TCP_KEEPINTVL", KEEPALIVE_INTERVAL_S),
        ("TCP_KEEPCNT", KEEPALIVE_PROBES),
    ):
        if hasattr(socket, name):
            listener.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
