"""One fault: how it is injected into a running gateway, and what its clients may see."""

from __future__ import annotations

import asyncio
import contextlib
import re
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.faults.checks import MEMORY_MB, Ends, Verdict, snapshot, verdict
from benchmarks.faults.client import chat, exchange
from benchmarks.faults.rig import KINDS, Kind, Rig, rig, until

RECOVERY_S = 60.0
"""Longest time (s) until the gateway serves a chat again after a fault."""


@contextlib.asynccontextmanager
async def _nothing(folder: Path) -> AsyncIterator[dict[str, Any]]:
    yield {}


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault.

    Attributes:
        name: in the table. ``done``: what is done, in one sentence.
        inject: injects the fault once, with its load, and ends it.
        ends: expression for all ends (`Reply.end`) of requests that clients may see.
        abusive: the same for clients that misbehave.
        kinds: kinds of engines that it applies to.
        memory_mb: growth of resident memory (MB) that one round may leave.
        around: what must exist before the gateway starts; yields arguments of `rig`.
    """

    name: str
    done: str
    inject: Callable[[Rig, Ends], Awaitable[None]]
    ends: str = "200"
    abusive: str = ""
    kinds: tuple[Kind, ...] = KINDS
    memory_mb: float = MEMORY_MB
    around: Callable[[Path], AbstractAsyncContextManager[dict[str, Any]]] = _nothing


@dataclass(slots=True)
class Result:
    """What happened in all rounds of a fault. ``memory_mb``: growth of the last round. ``problems``: what is wrong."""

    fault: Fault
    kind: Kind
    rounds: int = 0
    seen: Counter[str] = field(default_factory=Counter)
    abusive: Counter[str] = field(default_factory=Counter)
    recovery_s: list[float] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


async def measure(fault: Fault, kind: Kind, rounds: int) -> Result:
    """Inject ``fault`` into one gateway ``rounds`` times, and check what is left after each."""
    result = Result(fault, kind)
    with tempfile.TemporaryDirectory(prefix="antares-faults-") as name:
        folder = Path(name)
        async with fault.around(folder) as options, rig(kind, folder, **options) as running:
            # Pools, caches and buffers fill first, so that their size is not taken for a leak.
            await asyncio.gather(*(exchange(running.port, chat(max_tokens=4)) for _ in range(64)))
            for _ in range(rounds):
                before, ends = await snapshot(running), Ends()
                await fault.inject(running, ends)
                if ends.recovery_s is None:
                    await recovered(running, ends)
                result.recovery_s.append(ends.recovery_s or 0.0)
                left = await verdict(running, before, ends)
                result.verdicts.append(left)
                result.problems += left.problems(fault.memory_mb) + unexpected(fault, ends)
                result.seen += ends.seen
                result.abusive += ends.abusive
                result.rounds += 1
    return result


async def recovered(running: Rig, ends: Ends) -> None:
    """Wait until the gateway serves a chat, and note how long it took. Called when the fault ends."""
    ends.recovery_s = await until(lambda: _serves(running, ends), RECOVERY_S)


async def _serves(running: Rig, ends: Ends) -> bool:
    reply = await exchange(running.port, chat(model=running.model, max_tokens=2), limit_s=RECOVERY_S)
    ends.probes[reply.end] += 1
    return reply.is_complete


def unexpected(fault: Fault, ends: Ends) -> list[str]:
    """Return the ends that the clients of ``fault`` should not have seen."""
    pairs = [(ends.seen, fault.ends), (ends.abusive, fault.abusive)]
    return [
        f"{count} x {end}" for seen, allowed in pairs for end, count in seen.items() if not re.fullmatch(allowed, end)
    ]


@contextlib.asynccontextmanager
async def load(running: Rig, ends: Ends, clients: int = 8, **fields: Any) -> AsyncIterator[None]:
    """Run ``clients`` clients, each with one chat after the other, until the block ends. Half of them stream."""
    stop = asyncio.Event()

    async def client(number: int) -> None:
        while not stop.is_set():
            body = chat(**{"stream": number % 2 == 0, "max_tokens": 40, "ignore_eos": True, **fields})
            await ends.add(exchange(running.port, body))

    tasks = [asyncio.create_task(client(number)) for number in range(clients)]
    try:
        yield
    finally:
        stop.set()
        await asyncio.gather(*tasks)
