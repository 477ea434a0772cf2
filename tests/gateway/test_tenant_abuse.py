"""Each kind of abuse over real HTTP, beside which the other tenant's requests are served.

The victim sends its requests once the abuse holds all that it can get. The tests then check the order in which requests
are served, and which tenants wait for a shared limit. These do not depend on the speed of the machine.
"""

from __future__ import annotations

import asyncio
import math
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from benchmarks.isolation import http_gateway, http_slow, http_victim
from benchmarks.isolation.http_abuse import ABUSES, Abuser
from benchmarks.isolation.http_gateway import ABUSER_KEY, CONFIG, SLOTS, VICTIM_KEY, engine
from benchmarks.isolation.http_victim import run_victim
from gateway.api.body_memory import FREE_BYTES
from gateway.api.connections import raise_descriptor_limit
from gateway.api.shared_limit import SharedLimit, Sharer
from tests.fixtures.live_gateway import Live, live
from tests.fixtures.live_server import HANG_S, eventually

pytestmark = [
    pytest.mark.process,
    pytest.mark.timeout(240),
    pytest.mark.skipif(sys.platform == "win32", reason="sets socket options that Windows lacks"),
]

CLASSES = {"chat": {"ttft_ms": 60_000, "tpot_ms": 1000}, "free": {}}
"""Bounds that a loaded machine keeps too."""

VICTIM_S = 1.0
"""Seconds in which the victim sends its requests."""

REQUESTS, CHATS = 8, 6
"""Requests of the victim in this time, and how many of them are scheduled. Half of them have 100 KiB."""


@pytest.fixture(autouse=True)
def no_time_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    """The victim attains if its answers are whole."""
    raise_descriptor_limit()
    for bound in ("TTFT_S", "TPOT_S", "EMBEDDING_S"):
        monkeypatch.setattr(http_victim, bound, math.inf)
    monkeypatch.setattr(http_victim, "TIMEOUT_S", HANG_S)


@pytest.fixture
def waited(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each tenant has waited for a shared limit: memory of bodies or a pass-through slot."""
    counts: Counter[str] = Counter()
    turn = SharedLimit.turn

    def counted(limit: SharedLimit, sharer: Sharer) -> asyncio.Lock:
        counts[sharer.name] += 1
        return turn(limit, sharer)

    monkeypatch.setattr(SharedLimit, "turn", counted)
    return counts


@dataclass
class Abused:
    """A gateway, and what the abuser saw and waited for."""

    antares: Live
    seen: Counter[str]
    waited: Counter[str]

    async def serve_victim(self) -> None:
        """Send the victim's requests. All are answered whole, and none waits for a shared limit."""
        victim = await run_victim(self.antares.url, VICTIM_KEY, VICTIM_S, seed=0)
        assert (victim.ends, victim.adherence) == ({"200": REQUESTS}, 1), self.seen
        assert "victim" not in self.waited, "its part of every shared limit is free"


@asynccontextmanager
async def abused(kind: str, waited: Counter[str], **limits: Any) -> AsyncIterator[Abused]:
    """Run the abuse ``kind`` on a gateway with ``limits`` during the block. Check that it leaves nothing behind."""
    config = {**CONFIG, "classes": CLASSES, "limits": {**CONFIG["limits"], "head_timeout_s": HANG_S, **limits}}
    async with live(engine(), **config) as antares:
        abuser = Abuser(int(antares.url.rpartition(":")[2]), ABUSER_KEY)
        abuse = asyncio.create_task(ABUSES[kind](abuser))  # type: ignore[arg-type]
        try:
            yield Abused(antares, abuser.seen, waited)
            assert not abuse.done()
        finally:
            abuse.cancel()
            await asyncio.gather(abuse, return_exceptions=True)
        await eventually(lambda: antares.gateway.proxy.in_flight == 0)
        assert antares.gateway.proxy.open_requests.used == antares.gateway.proxy.bodies.used == 0


async def test_stalled_readers_that_take_all_slots_give_way(waited: Counter[str]) -> None:
    async with abused("stalled_16", waited) as case:
        await eventually(lambda: case.antares.engine.state.engine_running == SLOTS)
        await case.serve_victim()
        await eventually(lambda: case.antares.outcomes["finished"] >= CHATS)
        assert case.antares.outcomes["finished"] == CHATS, "no stalled request had to end first"


async def test_flood_of_chats_is_overtaken(waited: Counter[str]) -> None:
    async with abused("flood", waited) as case:
        waiting = case.antares.gateway.engine_queues[0].waiting
        await eventually(lambda: len(waiting) >= 200)
        earlier = {request.id for request in waiting}
        await case.serve_victim()
        still = earlier & {request.id for request in waiting}
        assert len(still) >= len(earlier) / 2, "the victim's chats run before those that arrived earlier"


async def test_flood_of_calls_leaves_a_pass_through_slot(waited: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    # So long that a loaded machine also sends enough calls meanwhile.
    monkeypatch.setattr(http_gateway, "EMBEDDING_S", 2.0)
    async with abused("pass_through", waited) as case:
        await eventually(lambda: waited["abuser"] > 0)
        await case.serve_victim()


@pytest.mark.parametrize(("kind", "size"), [("slow_bodies", 8 << 20), ("huge_bodies", 7_900_000)])
async def test_large_bodies_leave_memory(kind: str, size: int, waited: Counter[str]) -> None:
    # Two bodies would leave too little memory for one of the victim's.
    async with abused(kind, waited, body_memory_bytes=2 * (size - FREE_BYTES) + 20_000) as case:
        await eventually(lambda: waited["abuser"] > 0)
        await case.serve_victim()


@pytest.mark.parametrize("kind", ["silent_connections", "busy_connections"])
async def test_connections_from_one_address_leave_some(kind: str, waited: Counter[str]) -> None:
    async with abused(kind, waited, max_connections=100) as case:
        # Three quarters of all.
        await eventually(lambda: len(case.antares.gateway.connections) >= 75)
        await case.serve_victim()


@pytest.mark.parametrize(("kind", "least_bytes"), [("stalled_500", 0), ("stalled_embeddings", 20 << 20)])
async def test_500_readers_that_stall_cost_the_foreground_nothing(
    kind: str, least_bytes: int, waited: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_gateway, "EMBEDDING_S", 0.0)
    async with abused(kind, waited, stall_s=600.0) as case:
        connections = case.antares.gateway.connections
        await eventually(lambda: len(connections) >= 500 and connections.buffered >= least_bytes)
        await case.serve_victim()
        assert len(connections) >= 500, "none of them was cut"


@pytest.mark.parametrize("kind", ["silent", "half_head", "head", "headers", "no_body", "half_body", "body", "chunks"])
async def test_slow_sender_is_cut_within_its_time_out(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    limits: dict[str, Any] = {"head_timeout_s": 0.6, "stall_s": 1.0, "idle_timeout_s": 2.0}
    monkeypatch.setattr(http_slow, "LIMITS", limits)
    async with live(engine(), **{**CONFIG, "limits": limits}) as antares:
        (row,) = await http_slow.measure(int(antares.url.rpartition(":")[2]), ABUSER_KEY, clients=20, only=(kind,))
        assert row["shortest_s"] >= row["limit_s"] * 0.9
        # Checked twice a second; the rest is for a machine under load. It would try for twice the limit.
        assert row["longest_s"] <= row["limit_s"] + 0.9
        assert row["answers"] == [{"silent": "none"}.get(kind, "408")]
        await eventually(lambda: len(antares.gateway.connections) == 0)
