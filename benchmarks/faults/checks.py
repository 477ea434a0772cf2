"""The three checks after every fault: one outcome per request, a balanced ledger, and memory and descriptors back."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Awaitable
from dataclasses import dataclass, field
from typing import Any

from benchmarks.faults.client import CLOSED, HUNG_UP, NO_ANSWER, Reply
from benchmarks.faults.rig import Rig, descriptors, memory_mb, until

OUTCOMES = ("finished", "rejected", "failed", "cancelled")

MEMORY_MB = 96.0
"""Growth of resident memory (MB) that one fault may leave. The allocator keeps some; a leak grows with every fault."""

SPARE_DESCRIPTORS = 2
"""Descriptors that may differ: the gateway opens and closes some by itself, such as those of a health probe."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The state of an idle gateway. ``outcomes``: ended requests by outcome."""

    accepted: int
    outcomes: dict[str, int]
    memory_mb: float
    descriptors: int


@dataclass(slots=True)
class Ends:
    """What the clients of one fault saw: ``seen`` counts the ends (`Reply.end`) of the requests that were due to end.

    ``abusive`` counts those of clients that sent no whole request. The gateway may close their connections.
    ``probes`` counts those that asked whether the gateway has recovered, ``recovery_s`` (s) after the fault's end.
    """

    seen: Counter[str] = field(default_factory=Counter)
    abusive: Counter[str] = field(default_factory=Counter)
    probes: Counter[str] = field(default_factory=Counter)
    recovery_s: float | None = None

    async def add(self, call: Awaitable[Reply]) -> Reply:
        """Await a request and count its end."""
        reply = await call
        self.seen[reply.end] += 1
        return reply

    async def add_abuse(self, call: Awaitable[Reply]) -> Reply:
        """Await a client that misbehaves and count its end."""
        reply = await call
        self.abusive[reply.end] += 1
        return reply

    @property
    def lost(self) -> int:
        """Requests that got no answer: closed without one, or none in time."""
        return self.seen[CLOSED] + self.seen[NO_ANSWER] + self.abusive[NO_ANSWER]


def is_idle(status: dict[str, Any]) -> bool:
    """Whether the gateway holds no request."""
    queues = sum(engine["running"] + engine["waiting"] for engine in status["engines"])
    return bool(status["ledger"]["open"] == 0 and queues == 0)


async def snapshot(rig: Rig, descriptors_at_most: int | None = None, within_s: float = 20.0) -> Snapshot:
    """Return the state of the gateway once it is idle, and holds so few descriptors or ``within_s`` (s) have passed.

    Raises `TimeoutError` if it does not become idle.
    """

    async def idle() -> bool:
        return is_idle(await rig.status())

    await until(idle, within_s)
    pid = rig.process.pid
    if descriptors_at_most is not None:
        with contextlib.suppress(TimeoutError):
            await until(lambda: descriptors(pid) <= descriptors_at_most, within_s, 0.1)
    ledger = (await rig.status())["ledger"]
    await asyncio.sleep(0.05)
    return Snapshot(ledger["accepted"], {name: ledger[name] for name in OUTCOMES}, memory_mb(pid), descriptors(pid))


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a fault left behind. All of it must be zero, or for memory small.

    Attributes:
        lost: requests without an answer, or whose outcome is missing or does not fit what its client saw.
        leaked_requests: accepted requests without an outcome.
        leaked_descriptors: descriptors above those of before.
        memory_mb: growth of resident memory (MB).
        tracebacks: tracebacks in the log.
    """

    lost: int
    leaked_requests: int
    leaked_descriptors: int
    memory_mb: float
    tracebacks: int

    def problems(self, memory_mb: float = MEMORY_MB) -> list[str]:
        """What is wrong, one line each; empty if all three checks hold. ``memory_mb``: growth that is allowed (MB)."""
        found = [
            f"{name}: {count}"
            for name in ("lost", "leaked_requests", "leaked_descriptors", "tracebacks")
            if (count := getattr(self, name))
        ]
        return [*found, f"memory_mb: {self.memory_mb:.0f}"] if self.memory_mb > memory_mb else found


async def verdict(rig: Rig, before: Snapshot, ends: Ends) -> Verdict:
    """Return what the fault left behind, once the gateway is idle."""
    after = await snapshot(rig, before.descriptors + SPARE_DESCRIPTORS)
    outcomes = {name: after.outcomes[name] - before.outcomes[name] for name in OUTCOMES}
    accepted, ended = after.accepted - before.accepted, sum(outcomes.values())
    more = after.descriptors - before.descriptors
    return Verdict(
        lost=ends.lost + _mismatched(outcomes, accepted, ends),
        leaked_requests=accepted - ended,
        leaked_descriptors=more if more > SPARE_DESCRIPTORS else 0,
        memory_mb=round(after.memory_mb - before.memory_mb, 1),
        tracebacks=rig.log.count("Traceback"),
    )


def _mismatched(outcomes: dict[str, int], accepted: int, ends: Ends) -> int:
    """Return how many outcomes do not fit what the clients saw.

    A client that disconnects may do so before the gateway has its request, or after the response.
    """
    both = ends.seen + ends.abusive + ends.probes
    unknown, whole = both[HUNG_UP] + both[CLOSED], both["200"]
    failed = sum(count for end, count in both.items() if end.startswith(("5", "200, then")))
    too_few = max(0, whole - outcomes["finished"])
    too_many = max(0, outcomes["finished"] - whole - unknown)
    untold = max(0, outcomes["failed"] - failed - unknown)
    return too_few + too_many + untold + max(0, accepted - both.total())
