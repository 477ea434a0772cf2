"""Runs the rounds: starts all servers, lets them take turns, and returns one record for each turn."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random
import resource
import socket
import sys
import tempfile
import time
from array import array
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from benchmarks.overhead.peers import processes
from benchmarks.overhead.peers.client import Answers, Requests, all_at_once, connect, one_after_another
from benchmarks.overhead.peers.servers import TREE, Server

_START_S = 240.0
"""Longest time for a server to answer its first request, in seconds."""

_SETTLE_S = 0.1
"""Time after a turn for what a server does once it has answered, in seconds."""

_MOST_REQUESTS = 100_000
"""More requests than a turn has, so that no two turns of a server have a prompt in common."""

_PORTS = 20_000, 30_000
"""The first port of a server, and one past the last. Linux gives connections ports from 32,768 on."""

_SAMPLE_S = 0.25
"""Time between two readings of the memory, in seconds."""


@dataclass(frozen=True, slots=True)
class Shape:
    """The load of one turn.

    Without ``pace_ms`` each of ``connections`` sends requests one after the other, at most ``requests`` of them and for
    at most ``seconds``. With it, each sends one request, evenly over ``over_s`` (s), and the upstream sends its
    ``tokens`` at that pace. What has not ended ``limit_s`` (s) after the start has failed, and so has a stream with
    fewer than ``events`` events (None: ``tokens``).
    """

    name: str
    connections: int
    tokens: int
    stream: bool
    requests: int = 1
    seconds: float = 0.0
    pace_ms: float = 0.0
    over_s: float = 0.0
    limit_s: float = 20.0
    events: int | None = None


SHAPES = (
    Shape("first byte, 1 connection", 1, 8, stream=True, requests=400, seconds=4.0),
    Shape("whole answer, 1 connection", 1, 8, stream=False, requests=400, seconds=4.0),
    Shape("32 connections", 32, 8, stream=False, requests=1_000_000, seconds=2.0),
    # Not a multiple of the pace between two starts, so that the streams' tokens do not arrive together.
    Shape("32 paced streams", 32, 100, stream=True, pace_ms=20.0, over_s=0.2),
    Shape("500 streams at once", 500, 40, stream=True, pace_ms=50.0),
    Shape("2,000 streams", 2000, 16, stream=True, pace_ms=500.0, over_s=4.0, limit_s=30.0),
)
WARM_UPS = (
    Shape("warm-up", 1, 8, stream=True, requests=200, seconds=4.0),
    Shape("warm-up", 32, 8, stream=False, requests=1_000_000, seconds=1.0),
)


@dataclass(slots=True)
class Running:
    """A server that runs."""

    server: Server
    port: int
    pid: int
    idle_mib: float = 0.0


@contextlib.asynccontextmanager
async def all_running(servers: Sequence[Server], folder: Path) -> AsyncIterator[list[Running]]:
    """Start the upstream and ``servers``; stop them when the block ends.

    Raises:
        RuntimeError: a server did not answer. The message has the end of its log.
    """
    async with contextlib.AsyncExitStack() as stack:
        port = free_port()
        code = f"from benchmarks.overhead.peers.upstream import run; run({port})"
        here = {"PYTHONPATH": str(TREE)}
        log = folder / "upstream.log"
        upstream = await stack.enter_async_context(processes.running([sys.executable, "-c", code], log, here))
        await until_up(port, upstream, "upstream", log)
        found, starting = [], []
        for server in servers:
            if server.command is None:
                found.append(Running(server, port, upstream.pid))
                continue
            at = free_port()
            command = server.command(at, f"http://127.0.0.1:{port}", folder)
            log = folder / f"{at}.log"
            process = await stack.enter_async_context(processes.running(command, log, server.env))
            found.append(Running(server, at, process.pid))
            starting.append(until_up(at, process, server.name, log))
        await asyncio.gather(*starting)
        yield found


async def until_up(port: int, process: asyncio.subprocess.Process, name: str, log: Path) -> None:
    """Wait until the server on ``port`` answers a request.

    Raises:
        RuntimeError: it did not. The message has the end of its log.
    """
    deadline = time.monotonic() + _START_S
    probe = Shape("probe", 1, 1, stream=False, requests=1, seconds=1.0, limit_s=5.0)
    cause = "no answer"
    while time.monotonic() < deadline and process.returncode is None:
        answers, _ = await served(port, probe, 0)
        if answers.whole_s:
            return
        cause = next(iter(answers.errors), cause)
        await asyncio.sleep(0.2)
    raise RuntimeError(f"{name} did not start ({cause}); the end of its log:\n{processes.log_end(log)}")


def free_port() -> int:
    """Return a TCP port that is free now, and so are the next two, which some gateways take for their metrics.

    All three are below the kernel's range for connections. In that range, a connection could take a port first.
    """
    while True:
        port = random.randrange(*_PORTS, 3)
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for step in range(3):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port + step))
            return port


async def served(port: int, shape: Shape, first: int) -> tuple[Answers, float]:
    """Send the requests of ``shape``, numbered from ``first``. Return their answers and the seconds that it took."""
    answers = Answers()
    requests = Requests(shape.tokens, shape.stream, shape.pace_ms, first)
    events = shape.tokens if shape.events is None else shape.events
    connections = await connect(port, answers, shape.connections)
    start = time.perf_counter()
    try:
        if shape.pace_ms:
            await all_at_once(connections, requests, shape.over_s, shape.limit_s, events)
        elif connections:
            until = start + shape.seconds
            tasks = [
                asyncio.ensure_future(
                    one_after_another(connection, requests, shape.requests, until, events, shape.stream)
                )
                for connection in connections
            ]
            _, late = await asyncio.wait(tasks, timeout=shape.limit_s)
            for task in late:
                answers.fail("not finished in time")
                task.cancel()
        return answers, time.perf_counter() - start
    finally:
        for connection in connections:
            connection.close()


async def turn(running: Running, shape: Shape, first: int) -> dict[str, Any]:
    """Return the record of one turn."""
    highest = running.idle_mib

    async def watch() -> None:
        nonlocal highest
        while True:
            await asyncio.sleep(_SAMPLE_S)
            highest = max(highest, processes.memory_mib(running.pid))

    before = processes.thread_cpu_ns(running.pid)
    watching = asyncio.create_task(watch())
    try:
        with _no_collection():
            answers, took_s = await served(running.port, shape, first)
        await asyncio.sleep(_SETTLE_S)
    finally:
        watching.cancel()
    cpu_us = 1e6 * processes.cpu_s(before, processes.thread_cpu_ns(running.pid))
    count = len(answers.whole_s)
    return {
        "answers": count,
        "failures": answers.failures,
        "error": max(answers.errors, key=lambda cause: answers.errors[cause], default=None),
        "per_s": round(count / took_s, 3),
        "ttft_p50_ms": _quantile_ms(answers.ttft_s, 0.5),
        "ttft_p99_ms": _quantile_ms(answers.ttft_s, 0.99),
        "whole_p50_ms": _quantile_ms(answers.whole_s, 0.5),
        "whole_p99_ms": _quantile_ms(answers.whole_s, 0.99),
        "itl_p50_ms": _quantile_ms(answers.itl_s, 0.5),
        "itl_p99_ms": _quantile_ms(answers.itl_s, 0.99),
        "cpu_us_a_request": round(cpu_us / count, 1) if count else None,
        "cpu_us_an_event": round(cpu_us / (count * shape.tokens), 2) if count else None,
        "stream_kib": round(1024 * (highest - running.idle_mib) / shape.connections, 1),
        "peak_mib": round(processes.peak_memory_mib(running.pid), 1),
    }


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Keep the garbage collector of this process, the load client, out of a turn."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _quantile_ms(seconds: array[float], quantile: float) -> float | None:
    return round(1e3 * float(np.quantile(seconds, quantile)), 4) if seconds else None


async def measure(
    servers: Sequence[Server],
    rounds: int,
    shapes: Sequence[Shape] = SHAPES,
    warm_ups: Sequence[Shape] = WARM_UPS,
) -> list[dict[str, Any]]:
    """Return one record for each round, shape and server. Each round starts all servers afresh."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    runs: list[dict[str, Any]] = []
    number = 0
    console = Console(stderr=True)
    for round_ in range(rounds):
        with tempfile.TemporaryDirectory(prefix="antares-peers-") as folder:
            async with all_running(servers, Path(folder)) as found:
                for running in found:
                    for shape in warm_ups:
                        await served(running.port, shape, number := number + _MOST_REQUESTS)
                    running.idle_mib = processes.memory_mib(running.pid)
                # The order alternates, so that no server always follows the same one.
                turns = [
                    (number + at * _MOST_REQUESTS, shape, running)
                    for at, shape in enumerate(shapes, 1)
                    for running in found[:: 1 if (round_ + at) % 2 else -1]
                ]
                for first, shape, running in track(turns, f"Round {round_ + 1} of {rounds}", console=console):
                    # All servers get the same prompts: a real engine's times depend on their lengths.
                    record = await turn(running, shape, number := first)
                    name = running.server.name
                    runs.append({"round": round_, "shape": shape.name, "server": name, **record})
    return runs
