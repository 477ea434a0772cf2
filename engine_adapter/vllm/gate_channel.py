"""One-way channel from the step gate, inside vLLM's EngineCore process, to the gateway.

To a gateway on this machine that started the engine, it sends datagrams over a Unix socket. The environment variable
`SOCKET_ENV` holds the socket's path. One syscall covers many steps and never blocks the engine. A lost datagram does no
harm: counters are cumulative, and the step-time model only misses a few samples.

In a plain vLLM server, reports go to the gateways that connect to the report channel (`engine_adapter.report_channel`).
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

from engine_adapter.report_channel.messages import EngineLimits, QueueReport
from engine_adapter.report_channel.server import ADDRESS_ENV, INTERVAL_S, ReportServer
from engine_adapter.step_report import GateReport, StepReport

SOCKET_ENV = "ANTARES_GATE_SOCKET"
"""Environment variable with the path of the gateway's socket."""
OWN_INTERVAL_S = 0.1
"""Seconds between two reports to the gateway that started this engine. Each costs the engine a syscall and wakes the
gateway, which may share its cores."""
_MAX_DATAGRAM_BYTES = 1 << 17
_MAX_STEPS = 1024
"""Bounds the memory of the reporter: step reports kept until the next datagram."""


class GateReporter:
    """The engine's end of the channel. Sends step reports and counters at most every ``interval_s`` seconds.

    ``path``: the gateway's socket; None makes every call do nothing.
    """

    def __init__(self, path: str | None, interval_s: float = OWN_INTERVAL_S) -> None:
        self.report = GateReport()
        self._interval = interval_s
        self._steps: list[tuple[float, ...]] = []
        self._last_sent = 0.0
        self._server: ReportServer | None = None
        self._queue: Callable[[], QueueReport] = QueueReport
        self._socket: socket.socket | None = None
        if path:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            self._socket.setblocking(False)
            self._path = path

    @classmethod
    def from_env(cls) -> GateReporter:
        """A reporter to the socket in `SOCKET_ENV`. It does nothing if the variable is not set."""
        return cls(os.environ.get(SOCKET_ENV))

    def serve(self, limits: EngineLimits, queue: Callable[[], QueueReport], ranks: int = 1) -> None:
        """Open the report channel, if the environment asks for it and this is no gateway's own engine.

        ``queue`` returns the engine's queue. ``ranks``: data-parallel ranks of the server. Raises ValueError if the
        channel's variables are wrong, or if it has several ranks.
        """
        if self._socket is not None:
            return
        if ranks > 1 and os.environ.get(ADDRESS_ENV):
            raise ValueError(f"{ADDRESS_ENV}: data-parallel ranks cannot share it: run one `vllm serve` per rank")
        self._server, self._queue, self._interval = ReportServer.from_env(limits), queue, INTERVAL_S

    @property
    def _wanted(self) -> bool:
        return self._socket is not None or (self._server is not None and self._server.wanted)

    def step(self, now: float, step: StepReport) -> None:
        """Record ``step``, which ended at ``now`` (monotonic s)."""
        if not self._wanted:
            return
        if len(self._steps) < _MAX_STEPS:
            self._steps.append(tuple(step))
        if now - self._last_sent >= self._interval:
            self.flush(now)

    def flush(self, now: float) -> None:
        """Send the collected reports and the counters. Errors are ignored."""
        if not self._wanted:
            return
        payload = msgspec.json.encode({"steps": self._steps, "gate": self.report, "queue": self._queue()})
        self._steps.clear()
        self._last_sent = now
        if self._server is not None:
            self._server.publish(payload)
        if self._socket is not None:
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
