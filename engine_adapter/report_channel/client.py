"""The gateway's end of the report channel: one connection to one server, established again whenever it ends."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from engine_adapter.report_channel.messages import (
    LENGTH_BYTES,
    STALE_S,
    VERSION,
    Answer,
    Challenge,
    ChannelError,
    EngineLimits,
    Frames,
    Proofs,
    Report,
    Welcome,
    decoded,
    framed,
    handshake_length,
    is_same,
    new_nonce,
)

log = logging.getLogger("antares.reports")

CONNECT_S = 5.0
"""Seconds within which a connection is established and both ends have proved the key."""

RETRY_S = (0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
"""Seconds before each further attempt to connect; the last value repeats."""


class ReportClient:
    """Receives the reports of one server.

    Args:
        name: the engine's name, for log lines.
        host, port: where the server's scheduler class listens.
        key: the shared key.
        on_connected: called with the engine's limits once both ends have proved the key.
        on_report: called with each report, and with None for a heartbeat, and the number of reports that were dropped.
        on_lost: called when a connection ends that was established.
    """

    def __init__(
        self,
        name: str,
        host: str,
        port: int,
        key: bytes,
        *,
        on_connected: Callable[[EngineLimits], None],
        on_report: Callable[[Report | None, int], None],
        on_lost: Callable[[], None],
    ) -> None:
        self._name = name
        self._host, self._port = host, port
        self._key = key
        self._on_connected = on_connected
        self._on_report = on_report
        self._on_lost = on_lost
        self._why = ""

    async def run(self) -> None:
        """Receive reports until cancelled."""
        failures = 0
        while True:
            reason = ""
            try:
                async with asyncio.timeout(CONNECT_S):
                    reader, writer = await asyncio.open_connection(self._host, self._port)
                try:
                    async with asyncio.timeout(CONNECT_S):
                        frames, limits = await self._prove(reader, writer)
                    failures, self._why = 0, ""
                    log.info("engine %s: reports arrive from %s:%d", self._name, self._host, self._port)
                    await self._receive(reader, frames, limits)
                finally:
                    writer.transport.abort()
            except ChannelError as error:
                reason = str(error)
            except TimeoutError:
                reason = "no answer in time"
            except EOFError:
                reason = "the connection was closed"
            except OSError as error:
                reason = str(error)
            except Exception as error:
                log.exception("engine %s: a report from %s:%d failed", self._name, self._host, self._port)
                reason = str(error)
            self._log(reason)
            await asyncio.sleep(RETRY_S[min(failures, len(RETRY_S) - 1)])
            failures += 1

    def _log(self, reason: str) -> None:
        """Log why there are no reports, once for each reason in a row."""
        if reason != self._why:
            log.warning("engine %s: no reports from %s:%d: %s", self._name, self._host, self._port, reason)
        self._why = reason

    async def _prove(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> tuple[Frames, EngineLimits]:
        """Return what opens the server's reports, and its limits. Raises `ChannelError`."""
        challenge = decoded(await _message(reader), Challenge)
        if challenge.version != VERSION:
            versions = f"the server has version {challenge.version} of the report channel, this gateway {VERSION}"
            raise ChannelError(f"{versions}: run the same release of Antares in both")
        nonce = new_nonce()
        proofs = Proofs(self._key, challenge.nonce, nonce)
        writer.write(framed(Answer(nonce, proofs.gateway)))
        welcome = decoded(await _message(reader), Welcome)
        if welcome.error:
            raise ChannelError("the server has another key: compare its ANTARES_REPORT_KEY with report.key_env")
        if welcome.limits is None or not is_same(welcome.proof, proofs.server):
            raise ChannelError("what answers there does not have the key")
        return Frames(proofs.session), welcome.limits

    async def _receive(self, reader: asyncio.StreamReader, frames: Frames, limits: EngineLimits) -> None:
        self._on_connected(limits)
        try:
            while True:
                async with asyncio.timeout(STALE_S):
                    prefix = await reader.readexactly(Frames.PREFIX_BYTES)
                    content = await reader.readexactly(frames.length(prefix))
                dropped = frames.open(prefix, content)
                self._on_report(decoded(content, Report) if content else None, dropped)
        finally:
            self._on_lost()


async def _message(reader: asyncio.StreamReader) -> bytes:
    return await reader.readexactly(handshake_length(await reader.readexactly(LENGTH_BYTES)))
