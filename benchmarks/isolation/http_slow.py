"""Clients that send slowly, or nothing: after how long the gateway cuts each kind."""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass
from typing import Any

from benchmarks.isolation.http_abuse import CHAT, Abuser

LIMITS = {"head_timeout_s": 3.0, "stall_s": 5.0, "idle_timeout_s": 6.0}
"""Limits of this part of the study (s)."""

BODY_S = 68.0
"""Longest time of a body that arrives steadily (s): 60, and 1 for each MiB of the largest body."""

_HEAD = b"GET /health HTTP/1.1\r\nhost: x\r\n"
_CHUNKED = "transfer-encoding: chunked"


@dataclass(frozen=True, slots=True)
class Slow:
    """A client that sends ``first``, and then ``drop`` every ``every_s`` seconds; nothing more without a drop."""

    says: str
    limit: str
    limit_s: float
    first: bytes = b""
    drop: bytes = b""
    every_s: float = 0.2


def kinds(abuser: Abuser) -> dict[str, Slow]:
    """Return the kinds of slow clients."""
    head_s, stall_s, idle_s = LIMITS["head_timeout_s"], LIMITS["stall_s"], LIMITS["idle_timeout_s"]
    chunked, sized = abuser.head(CHAT, _CHUNKED), abuser.head(CHAT, "content-length: 60000")
    return {
        "silent": Slow("connects and sends nothing", "head_timeout_s", head_s),
        "half_head": Slow("half a head", "head_timeout_s", head_s, _HEAD),
        "head": Slow("a head, a byte at a time", "head_timeout_s", head_s, _HEAD + b"a: ", b"x"),
        "headers": Slow("headers, one at a time", "head_timeout_s", head_s, _HEAD, b"a: b\r\n"),
        "no_body": Slow("a head without its body", "stall_s", stall_s, sized),
        "half_body": Slow("half a body", "stall_s", stall_s, sized + b"{" + b" " * 30_000),
        "body": Slow("a body, a byte at a time", "stall_s", stall_s, sized + b"{", b" "),
        "chunks": Slow("chunks of one byte, without end", "stall_s", stall_s, chunked, b"1\r\n \r\n"),
        "steady": Slow("chunks of 1 KiB, without end", "body time", BODY_S, chunked, b"400\r\n%b\r\n" % (b" " * 1024)),
        "idle": Slow("one request, then nothing", "idle_timeout_s", idle_s, _HEAD + b"\r\n"),
    }


async def cut_after(abuser: Abuser, slow: Slow) -> tuple[float, str]:
    """Return after how many seconds the gateway ends the connection of a slow client, and the status that it sent."""
    async with abuser.connected() as (reader, writer):
        writer.write(slow.first)
        reading, started = asyncio.create_task(reader.read()), time.monotonic()
        try:
            while not reading.done() and time.monotonic() < started + 2 * slow.limit_s:
                await asyncio.wait({reading}, timeout=slow.every_s)
                if slow.drop:
                    writer.write(slow.drop)
            ended_s, answer = time.monotonic() - started, b""
            if reading.done():
                with contextlib.suppress(ConnectionError):
                    answer = reading.result()
            return ended_s, answer[9:12].decode()
        finally:
            reading.cancel()


async def measure(port: int, key: str, clients: int, only: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """Return what happens to ``clients`` slow clients of each kind, all at once."""
    abuser = Abuser(port, key)
    chosen = {name: slow for name, slow in kinds(abuser).items() if not only or name in only}
    groups = [asyncio.gather(*(cut_after(abuser, slow) for _ in range(clients))) for slow in chosen.values()]
    rows = []
    for (name, slow), ends in zip(chosen.items(), await asyncio.gather(*groups), strict=True):
        times = sorted(seconds for seconds, _ in ends)
        rows.append(
            {
                "kind": name, "says": slow.says, "limit": slow.limit, "limit_s": slow.limit_s, "clients": clients,
                "answers": sorted({status or "none" for _, status in ends}),
                "shortest_s": round(times[0], 2), "longest_s": round(times[-1], 2),
            }
        )  # fmt: skip
    return rows
