"""The server's end of the report channel, in vLLM's EngineCore process.

A thread with its own event loop accepts gateways and sends to them, so the scheduler never waits for a socket. It hands
over one encoded report at most every `INTERVAL_S` seconds, and none while no gateway is connected.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import threading
from collections.abc import Coroutine
from dataclasses import dataclass

from engine_adapter.report_channel.messages import (
    HEARTBEAT_S,
    LENGTH_BYTES,
    MAX_REPORT_BYTES,
    VERSION,
    Answer,
    Challenge,
    ChannelError,
    EngineLimits,
    Frames,
    Proofs,
    Welcome,
    checked_key,
    decoded,
    framed,
    handshake_length,
    is_same,
    new_nonce,
)

log = logging.getLogger("antares.reports")

ADDRESS_ENV = "ANTARES_REPORT_ADDRESS"
"""Environment variable with the address that gateways connect to, such as ``0.0.0.0:9410``. Without it: no channel."""

KEY_ENV = "ANTARES_REPORT_KEY"
"""Environment variable with the key that gateways must have."""

INTERVAL_S = 0.05
"""Shortest time (s) between two reports. A gateway with 64 engines then reads 1,280 reports per second."""

MAX_CONNECTIONS = 32
"""Connections at the same time, those without a proof of the key included. Convention: gateways are few."""

HANDSHAKE_S = 3.0
"""Seconds within which a gateway must prove that it has the key."""

MAX_UNSENT_BYTES = 4 * MAX_REPORT_BYTES
"""Bytes that wait for a slow gateway. Further reports to it are dropped and counted."""

MAX_HANDED_OVER = 16
"""Reports that wait for the thread. Further ones are dropped and counted."""


@dataclass(slots=True, eq=False)
class _Link:
    """A connected gateway that has proved the key."""

    writer: asyncio.StreamWriter
    frames: Frames
    dropped: int = 0

    def send(self, content: bytes, dropped_before: int) -> None:
        if self.writer.transport.get_write_buffer_size() > MAX_UNSENT_BYTES:
            self.dropped += 1
            return
        self.writer.write(self.frames.seal(content, self.dropped + dropped_before))


class ReportServer:
    """Sends reports to every connected gateway that has the key.

    Args:
        host, port: where to listen; port 0 takes a free one.
        key: the shared key.
        limits: what gateways learn of the engine when they connect.

    Raises:
        OSError: the address is in use, or not one of this machine.
    """

    def __init__(self, host: str, port: int, key: bytes, limits: EngineLimits) -> None:
        self._key = key
        self._limits = limits
        self._links: set[_Link] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        # One thread writes each of the two, so neither needs a lock.
        self._handed_over = self._sent = 0
        self._dropped = 0
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.create_server((host, port), family=family)
        self.port: int = self._socket.getsockname()[1]
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="antares-reports", daemon=True)
        self._thread.start()

    @classmethod
    def from_env(cls, limits: EngineLimits) -> ReportServer | None:
        """Return a server at the address in `ADDRESS_ENV`, or None without that.

        Raises ValueError if the address or the key is missing, malformed or cannot be used.
        """
        address = os.environ.get(ADDRESS_ENV)
        if not address:
            return None
        host, _, port = address.rpartition(":")
        host = host.removeprefix("[").removesuffix("]")
        if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
            raise ValueError(f"{ADDRESS_ENV} {address!r} is not an address: write it like 127.0.0.1:9410")
        key = checked_key(os.environ.get(KEY_ENV, ""), KEY_ENV)
        try:
            return cls(host, int(port), key, limits)
        except OSError as error:
            raise ValueError(f"{ADDRESS_ENV} {address!r} cannot be used: {error}") from None

    @property
    def wanted(self) -> bool:
        """Whether a gateway is connected. If not, there is no need to collect reports."""
        return bool(self._links)

    def publish(self, content: bytes) -> None:
        """Send an encoded report to all gateways. Never blocks: a report that cannot be sent soon is dropped."""
        if self._handed_over - self._sent >= MAX_HANDED_OVER or len(content) > MAX_REPORT_BYTES:
            self._dropped += 1
            return
        self._handed_over += 1
        with contextlib.suppress(RuntimeError):  # the loop was closed
            self._loop.call_soon_threadsafe(self._send, content)

    def close(self) -> None:
        """End all connections and the thread. Idempotent."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.create_task(self._serve())
        try:
            self._loop.run_forever()
        finally:
            for task in asyncio.all_tasks(self._loop):
                task.cancel()
            self._loop.run_until_complete(asyncio.sleep(0))
            self._socket.close()
            self._loop.close()

    async def _serve(self) -> None:
        self._socket.setblocking(False)
        server = await asyncio.start_server(self._on_connection, sock=self._socket, limit=2048)
        async with server:
            while True:
                await asyncio.sleep(HEARTBEAT_S)
                self._broadcast(b"")

    def _send(self, content: bytes) -> None:
        self._sent += 1
        self._broadcast(content)

    def _broadcast(self, content: bytes) -> None:
        for link in self._links:
            link.send(content, self._dropped)

    async def _on_connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        if len(self._tasks) >= MAX_CONNECTIONS:
            writer.transport.abort()
            return
        self._tasks.add(task)
        try:
            await _quietly(self._talk(reader, writer))
        finally:
            self._tasks.discard(task)
            writer.transport.abort()

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Check that a gateway has the key, and keep it among the links until it leaves."""
        async with asyncio.timeout(HANDSHAKE_S):
            nonce = new_nonce()
            writer.write(framed(Challenge(VERSION, nonce)))
            length = handshake_length(await reader.readexactly(LENGTH_BYTES))
            answer = decoded(await reader.readexactly(length), Answer)
            proofs = Proofs(self._key, nonce, answer.nonce)
            if not is_same(answer.proof, proofs.gateway):
                log.warning("report channel: a gateway at %s has another key", writer.get_extra_info("peername"))
                writer.write(framed(Welcome(error="it has another key")))
                await writer.drain()
                # Time for the gateway to read this before the connection is aborted.
                await reader.read(1)
                return
            writer.write(framed(Welcome(proofs.server, self._limits)))
        link = _Link(writer, Frames(proofs.session))
        self._links.add(link)
        try:
            # A gateway sends nothing more: this ends when it closes the connection.
            await reader.read(1)
        finally:
            self._links.discard(link)


async def _quietly(talk: Coroutine[object, object, None]) -> None:
    """Run ``talk`` until the connection ends, however it ends."""
    with contextlib.suppress(OSError, TimeoutError, EOFError, ChannelError):
        await talk
