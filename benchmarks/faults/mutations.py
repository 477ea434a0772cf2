"""Sends mutated bodies and heads to a gateway in front of each kind of engine.

    python -m benchmarks.faults.mutations --seed 0 --count 20000

Each mutation goes over its own connection. It must be answered or its connection closed within seconds, without a 5xx
of the gateway, without a traceback in its log, and with a balanced ledger at the end.
"""

from __future__ import annotations

import asyncio
import random
import re
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import results_json
from benchmarks.command import chosen
from benchmarks.faults.checks import Ends, snapshot, verdict
from benchmarks.faults.client import NO_ANSWER, Reply, chat, exchange
from benchmarks.faults.mutate import Mutation, mutation
from benchmarks.faults.rig import KINDS, Kind, Rig, rig

CONNECTIONS = 48
"""Mutations at the same time."""

ANSWER_S = 20.0
"""Longest time (s) until a mutation is answered or its connection is closed. Its answer may be 8,192 tokens long."""

EXAMPLES = 5
"""Mutations of each kind of mistake that the report quotes."""


@dataclass(slots=True)
class Found:
    """What mutations did. ``mistakes``: kind of mistake to examples; empty if all is well."""

    ends: Ends = field(default_factory=Ends)
    mistakes: dict[str, list[str]] = field(default_factory=dict)
    longest_s: float = 0.0

    def mistake(self, kind: str, example: str) -> None:
        """Note an example of a mistake."""
        examples = self.mistakes.setdefault(kind, [])
        if len(examples) < EXAMPLES:
            examples.append(example)


async def send(running: Rig, mutations: list[Mutation], found: Found) -> None:
    """Send ``mutations``, `CONNECTIONS` at a time."""
    left = iter(mutations)

    async def client() -> None:
        for each in left:
            started = time.monotonic()
            reply = await found.ends.add_abuse(exchange(running.port, each.data, limit_s=ANSWER_S))
            found.longest_s = max(found.longest_s, time.monotonic() - started)
            if is_mistake(reply, running):
                found.mistake(reply.end, f"{each.path}: {each.what}: {each.data[:300]!r}")

    await asyncio.gather(*(client() for _ in range(CONNECTIONS)))


def is_mistake(reply: Reply, running: Rig) -> bool:
    """Whether the gateway should have answered otherwise: not at all, or with a 5xx that is not an engine's."""
    # 501 is the answer to a transfer coding that the gateway does not have.
    return reply.end == NO_ANSWER or (reply.status >= 500 and reply.status != 501)


async def measure(kind: Kind, count: int, seed: int) -> dict[str, Any]:
    """Send ``count`` mutations to a gateway with an engine of ``kind``. Returns what happened."""
    r = random.Random(f"{seed} {kind}")
    found = Found()
    # NOTE: a small context, since a mutation may lose its limit of output tokens.
    with tempfile.TemporaryDirectory(prefix="antares-mutations-") as folder:
        times = {"b": 0.0, "d": 2e-4, "alpha": 0.0}
        async with rig(kind, Path(folder), slots=256, step_times=times) as running:
            warm_up = [exchange(running.port, chat(max_tokens=4)) for _ in range(CONNECTIONS)]
            await asyncio.gather(*warm_up)
            before = await snapshot(running)
            started = time.monotonic()
            for done in range(0, count, 1000):
                await send(running, [mutation(r) for _ in range(min(1000, count - done))], found)
            seconds = time.monotonic() - started
            left = await verdict(running, before, found.ends)
            served = await exchange(running.port, chat(max_tokens=4))
            for log in (running.log, running.server_log):
                for text in re.findall(r"Traceback.*?\n[^\s|][^\n]*", log, re.DOTALL):
                    found.mistake("traceback", text[-1500:])
            for line in re.findall(r"[^\n]*(?:ERROR|CRITICAL)[^\n]*", running.log):
                found.mistake("error in the log", line[-500:])
    if not served.is_complete:
        found.mistake("afterwards", f"a plain chat ended with {served.end}")
    for problem in left.problems():
        found.mistake("left behind", problem)
    return {
        "engine": kind,
        "mutations": count,
        "seconds": round(seconds, 1),
        "longest_s": round(found.longest_s, 2),
        "statuses": _by_status(found.ends.abusive),
        "ends": dict(found.ends.abusive.most_common()),
        "leaked_requests": left.leaked_requests,
        "leaked_descriptors": left.leaked_descriptors,
        "memory_mb": left.memory_mb,
        "tracebacks": left.tracebacks,
        "mistakes": found.mistakes,
    }


def _by_status(ends: Counter[str]) -> dict[str, int]:
    statuses: Counter[str] = Counter()
    for end, count in ends.items():
        statuses[end[:3] if end[:3].isdigit() else end] += count
    return dict(sorted(statuses.items()))


def main(
    count: Annotated[int, typer.Option(min=1, help="Mutations for each kind of engine.")] = 20_000,
    seed: Annotated[int, typer.Option(help="Seed of the mutations.")] = 0,
    engine: Annotated[
        list[str] | None, typer.Option(help="simulated or http; repeat for both. [default: both]")
    ] = None,
) -> None:
    """Send mutated requests to a gateway with each kind of engine. Exit code 1 if it made a mistake."""
    kinds = chosen("--engine", engine, KINDS)
    rows = [asyncio.run(measure(kind, count, seed)) for kind in KINDS if kind in kinds]
    sys.stdout.write(results_json.dumps({"seed": seed, "engines": rows}))
    raise typer.Exit(int(any(row["mistakes"] for row in rows)))


if __name__ == "__main__":
    typer.run(main)
