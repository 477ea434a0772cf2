"""Faults of the processes that the gateway depends on: a remote server and the predictor."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import re
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from benchmarks.faults.checks import Ends
from benchmarks.faults.client import chat, exchange
from benchmarks.faults.fault import Fault, load, recovered
from benchmarks.faults.rig import Rig, free_port, until

HANG_S = 10.0
"""Length of a hang (s). The gateway takes a server for dead after three failed probes, 5 to 7 s."""

_LOST = r"200|503 engine_lost|200, then engine_lost"


async def kill_server(running: Rig, ends: Ends) -> None:
    """SIGKILL the server while it serves, and start it again."""
    assert running.server is not None
    async with load(running, ends):
        await asyncio.sleep(0.7)
        running.server.kill()
        await running.server.wait()
        await asyncio.sleep(0.3)
        await running.start_server()
        await _until_listening(running.server_port)
        await recovered(running, ends)


async def pause_server(running: Rig, ends: Ends) -> None:
    """SIGSTOP the server while it serves, for a second."""
    await _stop_for(running, ends, 1.0)


async def hang_server(running: Rig, ends: Ends) -> None:
    """SIGSTOP the server while it serves, until it counts as dead."""
    await _stop_for(running, ends, HANG_S)


async def _stop_for(running: Rig, ends: Ends, seconds: float) -> None:
    assert running.server is not None
    async with load(running, ends):
        await asyncio.sleep(0.5)
        running.server.send_signal(signal.SIGSTOP)
        try:
            await asyncio.sleep(seconds)
        finally:
            running.server.send_signal(signal.SIGCONT)
        await recovered(running, ends)


async def start_slowly(running: Rig, ends: Ends) -> None:
    """Send requests while the server is down. It starts two seconds later, long before their deadline."""
    assert running.server is not None
    running.server.kill()
    await running.server.wait()
    request = chat(max_tokens=8, headers={"x-slo-ttft-ms": "90000"})
    asked = [asyncio.create_task(ends.add(exchange(running.port, request, limit_s=90.0))) for _ in range(50)]
    await asyncio.sleep(2)
    await running.start_server()
    await _until_listening(running.server_port)
    await recovered(running, ends)
    await asyncio.gather(*asked)


async def _until_listening(port: int) -> None:
    async def listens() -> bool:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            return False
        writer.close()
        return True

    await until(listens)


# --- the predictor ----------------------------------------------------------------------------------------------------

WAITS_FOR_LENGTH = {"x-slo-e2e-ms": "20000"}
"""With an end-to-end bound, the pace depends on the length, so even a short request waits for its prediction."""


@contextlib.asynccontextmanager
async def with_predictor(folder: Path) -> AsyncIterator[dict[str, Any]]:
    """A gateway with its own predictor."""
    yield {"predictor": {"timeout_ms": 50, "state_dir": str(folder / "state"), "expected_tokens": 64}}


async def _predicts(running: Rig) -> float:
    """Wait until the predictor predicts, and return the seconds. The gateway idles: no request notices it first."""

    async def predicts() -> bool:
        return b"\nantares_predictor_up 1.0" in (await running.get("/metrics")).body

    return await until(predicts, 30, 0.1)


async def _predictions(running: Rig, source: str) -> float:
    """Return the number of predictions by ``source``: ``service`` or ``fallback``."""
    text = (await running.get("/metrics")).body
    found = re.search(rb'^antares_predictions_total\{source="%s"\} (\S+)' % source.encode(), text, re.MULTILINE)
    return float(found[1]) if found else 0.0


async def _exceeds(running: Rig, fallbacks: float) -> bool:
    return await _predictions(running, "fallback") > fallbacks


async def predictor(running: Rig) -> int:
    """Return the predictor's process id, once it predicts."""
    await _predicts(running)
    pid = running.predictor_pid()
    assert pid is not None
    return pid


async def kill_predictor(running: Rig, ends: Ends) -> None:
    """SIGKILL the predictor while it predicts. The gateway starts it again."""
    pid = await predictor(running)
    async with load(running, ends, headers=WAITS_FOR_LENGTH):
        await until(lambda: _predictions(running, "service"))
        missed = await _predictions(running, "fallback")
        os.kill(pid, signal.SIGKILL)
        await until(lambda: _exceeds(running, missed))
        ends.recovery_s = await until(lambda: running.predictor_pid() not in (None, pid), 30)
    ends.recovery_s += await _predicts(running)


async def hang_predictor(running: Rig, ends: Ends) -> None:
    """SIGSTOP the predictor while it predicts, for a second."""
    pid = await predictor(running)
    async with load(running, ends, headers=WAITS_FOR_LENGTH):
        await until(lambda: _predictions(running, "service"))
        missed = await _predictions(running, "fallback")
        os.kill(pid, signal.SIGSTOP)
        try:
            await asyncio.sleep(1)
            await until(lambda: _exceeds(running, missed))
        finally:
            os.kill(pid, signal.SIGCONT)
        ends.recovery_s = await _predicts(running)


_OK = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"
GARBAGE: tuple[bytes, ...] = (
    b"",
    b"\x00\xff" * 500,
    b"HTTP/1.1 999 \r\n\r\n",
    b"HTTP/1.1 307 X\r\nlocation: /v1/predict\r\ncontent-length: 0\r\n\r\n",
    b"HTTP/1.1 500 X\r\ncontent-length: 0\r\n\r\n",
    b"HTTP/1.1 200 OK\r\ncontent-length: 99999999999\r\n\r\n{",
    b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 50_000,
    *(
        _OK + b"content-length: %d\r\n\r\n" % len(body) + body
        for body in (
            b"", b"{", b"null", b"[]", b'{"predictions": []}', b'{"predictions": [null]}', b'{"predictions": [[]]}',
            b'{"predictions": {"0": 1}}', b'{"predictions": [{"tokens": NaN}]}', b'{"predictions": [{"tokens": -1e9}]}',
            b'{"predictions": [{"tokens": 1e308, "median": 1e308, "p90": 1e308}]}',
            b'{"predictions": [{"tokens": "' + b"9" * 100 + b'"}]}', b"<html>", b"\xff\xfe\x00", b"[" * 100_000,
            b'{"predictions": [' + b"0," * 3_000_000 + b"0]}",
        )
    ),
)  # fmt: skip
"""What a broken predictor may answer."""


@contextlib.asynccontextmanager
async def with_garbage(folder: Path) -> AsyncIterator[dict[str, Any]]:
    """A predictor that answers each request with other `GARBAGE`, and is healthy."""
    answers = itertools.cycle(GARBAGE)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            head = await reader.readuntil(b"\r\n\r\n")
            healthy = _OK + b"content-length: 15\r\n\r\n" + b'{"status":"ok"}'
            writer.write(healthy if head.startswith(b"GET") else next(answers))
            await writer.drain()
        writer.close()

    port = free_port()
    server = await asyncio.start_server(answer, "127.0.0.1", port)
    try:
        yield {"predictor": {"url": f"http://127.0.0.1:{port}", "timeout_ms": 50, "expected_tokens": 64}}
    finally:
        server.close()


async def ask_garbage(running: Rig, ends: Ends) -> None:
    """Send requests while the predictor answers garbage."""
    async with load(running, ends, headers=WAITS_FOR_LENGTH):
        await asyncio.sleep(2)
        await until(lambda: _exceeds(running, 0))


PROCESS_FAULTS = (
    Fault("engine killed", "SIGKILL of the server under load, started again after 0.3 s", kill_server, _LOST,
          kinds=("http",)),
    Fault("engine paused", "SIGSTOP of the server under load for 1 s", pause_server, kinds=("http",)),
    Fault("engine hangs", f"SIGSTOP of the server under load for {HANG_S:g} s", hang_server,
          _LOST + r"|503 engine_unavailable|429 \w+", kinds=("http",)),
    Fault("engine starts slowly", "50 requests while the server is down for 2 s", start_slowly, kinds=("http",)),
    Fault("predictor killed", "SIGKILL of the predictor under load", kill_predictor, around=with_predictor),
    Fault("predictor hangs", "SIGSTOP of the predictor under load for 1 s", hang_predictor, around=with_predictor),
    Fault("predictor answers garbage", f"{len(GARBAGE)} kinds of garbage under load for 2 s", ask_garbage,
          around=with_garbage),
)  # fmt: skip
