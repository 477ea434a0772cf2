"""Each kind of abuse over real HTTP, for a few seconds: the other tenant's requests are served."""

from __future__ import annotations

import asyncio
import sys
from collections import Counter
from typing import Any

import pytest

from benchmarks.isolation import http_slow, http_victim
from benchmarks.isolation.http_abuse import Abuser, run_abuse
from benchmarks.isolation.http_gateway import ABUSER_KEY, CONFIG, VICTIM_KEY, engine
from benchmarks.isolation.http_victim import Victim, run_victim
from gateway.api.connections import raise_descriptor_limit
from gateway.api.shared_limit import SharedLimit, Sharer
from tests.fixtures.live_gateway import Live, live
from tests.fixtures.live_server import eventually

pytestmark = [
    pytest.mark.process,
    pytest.mark.timeout(240),
    pytest.mark.skipif(sys.platform == "win32", reason="sets socket options that Windows lacks"),
]

SECONDS = 4.0
SLOWNESS = (1, 2, 4)
"""Factors of the attempts, for the duration of the abuse and the victim's bounds. A loaded machine may fail the first
one. An abuse without limits fails each, because what it takes from the victim lasts as long as the abuse."""

BOUNDS = {name: getattr(http_victim, name) for name in ("TTFT_S", "TPOT_S", "EMBEDDING_S")}
"""Bounds of the victim (s)."""


def config_with(monkeypatch: pytest.MonkeyPatch, slower: float, **limits: Any) -> dict[str, Any]:
    """Return a gateway's configuration with ``limits``. The victim's bounds are ``slower`` times as long."""
    for name, bound_s in BOUNDS.items():
        monkeypatch.setattr(http_victim, name, slower * bound_s)
    chat = {"ttft_ms": 1000 * slower * BOUNDS["TTFT_S"], "tpot_ms": 1000 * slower * BOUNDS["TPOT_S"]}
    return {**CONFIG, "limits": limits, "classes": {**CONFIG["classes"], "chat": chat}}


async def abused(antares: Live, kind: str, seconds: float) -> tuple[Victim, Counter[str]]:
    """Run the victim beside the abuse ``kind``, which starts half a second later."""
    port = int(antares.url.rpartition(":")[2])

    async def abuse() -> Counter[str]:
        await asyncio.sleep(0.5)
        return await run_abuse(kind, Abuser(port, ABUSER_KEY), seconds)

    victim, seen = await asyncio.gather(run_victim(antares.url, VICTIM_KEY, seconds + 0.5, seed=0), abuse())
    assert len(victim.requests) == round(8 * (seconds + 0.5))
    return victim, seen


def tenants_that_wait(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count from now on how often each tenant waits for a shared limit: memory of bodies or a pass-through slot."""
    waited: Counter[str] = Counter()
    turn = SharedLimit.turn

    def counted(limit: SharedLimit, sharer: Sharer) -> asyncio.Lock:
        waited[sharer.name] += 1
        return turn(limit, sharer)

    monkeypatch.setattr(SharedLimit, "turn", counted)
    return waited


@pytest.mark.parametrize(
    ("kind", "least"),
    [
        ("stalled_16", 0.97),
        # On a busy machine, answers are late at the client.
        ("flood", 0.5),
        ("pass_through", 0.97),
        ("slow_bodies", 0.97),
        ("huge_bodies", 0.9),
        ("silent_connections", 0.97),
        ("busy_connections", 0.9),
    ],
)
async def test_victim_is_served_beside_an_abuser(kind: str, least: float, monkeypatch: pytest.MonkeyPatch) -> None:
    raise_descriptor_limit()
    waited = tenants_that_wait(monkeypatch)
    for slowness in SLOWNESS:
        config = config_with(monkeypatch, 3 * slowness, **{**CONFIG["limits"], "max_connections": 300})
        async with live(engine(), **config) as antares:
            victim, seen = await abused(antares, kind, slowness * SECONDS)
            assert "victim" not in waited, "its part of every shared limit is free"
            await eventually(lambda antares=antares: antares.gateway.proxy.in_flight == 0)  # type: ignore[misc]
            assert antares.gateway.proxy.open_requests.used == antares.gateway.proxy.bodies.used == 0
        # A loaded machine reads few of the huge bodies.
        if seen.total() > 3 and victim.adherence >= least:
            return
    pytest.fail(f"the victim: {victim.ends}, TTFT {victim.ttft_s}; the abuser: {seen}")


@pytest.mark.parametrize(("kind", "least_bytes"), [("stalled_500", 0), ("stalled_embeddings", 20 << 20)])
async def test_500_readers_that_stall_cost_the_foreground_nothing(
    kind: str, least_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    raise_descriptor_limit()
    for slowness in SLOWNESS:
        async with live(engine(), **config_with(monkeypatch, slowness, stall_s=60.0)) as antares:
            held: list[tuple[int, int]] = []
            watching = asyncio.create_task(_watch(antares, held))
            victim, seen = await abused(antares, kind, slowness * SECONDS)
            watching.cancel()
            await eventually(antares.is_idle)
        connections, buffered = max(held)
        # A loaded machine connects fewer than 500 in time.
        enough = min(seen["unread"], connections) >= 250 and buffered >= least_bytes
        if enough and set(victim.ends) == {"200"} and victim.adherence >= 0.97:
            return
    pytest.fail(f"the victim: {victim.ends}, TTFT {victim.ttft_s}; {connections} connections hold {buffered} bytes")


async def _watch(antares: Live, held: list[tuple[int, int]]) -> None:
    """Note connections and bytes that wait for clients, ten times a second."""
    while True:
        held.append((len(antares.gateway.connections), antares.gateway.connections.buffered))
        await asyncio.sleep(0.1)


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
