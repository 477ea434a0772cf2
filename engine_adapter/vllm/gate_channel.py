"""One-way channel from the step gate, inside vLLM's EngineCore process, to the gateway.

It sends datagrams over a Unix socket. The environment variable `SOCKET_ENV` holds the socket's path. One syscall
covers many steps and never blocks the engine. A lost datagram does no harm: counters are cumulative, and the step-time
model only misses a few samples.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path

import msgspec

from engine_adapter.step_report import GateReport, StepReport

SOCKET_ENV = "ANTARES_GATE_SOCKET"
"""Environment variable with the path of the gateway's socket."""
_MAX_DATAGRAM_BYTES = 1 << 17
_MAX_STEPS = 1024
"""Bounds the memory of the reporter: step reports kept until the next datagram."""


class GateReporter:
    """The engine's end of the channel. Sends step reports and counters at most every ``interval_s`` seconds.

    ``path``: the gateway's socket; None makes every call do nothing.
    """

    def __init__(self, path: str | None, interval_s: float = 0.02) -> None:
        self.report = GateReport()
        self._interval = interval_s
        self._steps: list[tuple[float, ...]] = []
        self._last_sent = 0.0
        self._socket: socket.socket | None = None
        if path:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            self._socket.setblocking(False)
            self._path = path

    @classmethod
    def from_env(cls) -> GateReporter:
        """A reporter to the socket in `SOCKET_ENV`. It does nothing if the variable is not set."""
        return cls(os.environ.get(SOCKET_ENV))

    def step(self, now: float, step: StepReport) -> None:
        """Record ``step``, which ended at ``now`` (monotonic s)."""
        if self._socket is None:
            return
        if len(self._steps) < _MAX_STEPS:
            self._steps.append(tuple(step))
        if now - self._last_sent >= self._interval:
            self.flush(now)

    def flush(self, now: float) -> None:
        """Send the collected reports and the counters. Errors are ignored."""
        if self._socket is None:
            return
        payload = msgspec.json.encode({"steps": self._steps, "gate": self.report})
        self._steps.clear()
        self._last_sent = now
        with contextlib.suppress(OSError):
            self._socket.sendto(payload, self._path)


class GateListener:
    """The gateway's end of the channel. Owns the socket and calls ``on_report`` on the event loop's thread."""

    def __init__(self, on_report: Callable[[GateReport, list[StepReport]], None]) -> None:
        self._on_report = on_report
        self._folder = tempfile.TemporaryDirectory(prefix="antares-gate-")
        self.path = str(Path(self._folder.name) / "gate.sock")
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        self._socket.bind(self.path)

    def open(self, loop: asyncio.AbstractEventLoop) -> None:
        """Start reading on ``loop``."""
        self._loop = loop
        loop.add_reader(self._socket.fileno(), self._drain)

    def close(self) -> None:
        """Stop reading and remove the socket. Idempotent."""
        if self._socket.fileno() >= 0:
            with contextlib.suppress(AttributeError, RuntimeError):
                self._loop.remove_reader(self._socket.fileno())
            self._socket.close()
        self._folder.cleanup()

    def _drain(self) -> None:
        while True:
            try:
                payload = self._socket.recv(_MAX_DATAGRAM_BYTES)
            except (BlockingIOError, OSError):
                return
            with contextlib.suppress(msgspec.DecodeError, ValueError, TypeError, KeyError):
                message = msgspec.json.decode(payload)
                self._on_report(GateReport(**message["gate"]), [StepReport(*step) for step in message["steps"]])
