"""Requests lost, and the time until traffic leaves and returns, when one of two engines fails.

Two scripted servers (`benchmarks.faults.server`) behind one gateway, over real HTTP on this machine. A has the fault
from the start, B is healthy. Once all requests have ended, A is repaired, and load continues until its traffic is back.
"""

from __future__ import annotations

import asyncio
import random
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any

import httpx
import typer
import uvicorn

from benchmarks.command import AsJson, PageOf, chosen, print_results, write_page
from benchmarks.faults.server import FAULTS, FaultyServer
from benchmarks.markdown import table, wrapped
from engine_adapter.engine import ASGIApp
from engine_adapter.remote.engine import HttpEngine
from gateway.app import Gateway
from gateway.config.schema import parse
from gateway.listening import listen

TTFT_MS = 5000
RETURN_SHARE, RETURN_WINDOW, RETURN_LIMIT_S = 0.25, 40, 60.0
"""Traffic has returned when A got this share of the last `RETURN_WINDOW` requests. Half of its part of equal loads."""

MEANINGS = {
    "close": "closes the connection",
    "cut": "breaks every response after two tokens",
    "hang": "accepts requests, answers none",
    "random": "500 for 30% of the requests",
    "random_close": "closes 30% of the connections",
    "slow": "first token after 2 s, faster with each request",
}


@asynccontextmanager
async def serve(app: ASGIApp) -> AsyncIterator[str]:
    """Serve ``app`` on a free port of 127.0.0.1. Yields its URL."""
    listener = listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, lifespan="off", log_level="critical", timeout_graceful_shutdown=1))
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.started:
        await asyncio.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        await serving
        listener.close()


@dataclass
class Load:
    """Clients that each send one request after the other; every second one is streamed."""

    http: httpx.AsyncClient
    a: FaultyServer
    b: FaultyServer
    random: random.Random
    ends: Counter[str] = field(default_factory=Counter)
    latencies_s: list[float] = field(default_factory=list)
    at_a: list[bool] = field(default_factory=list)

    async def ask(self) -> None:
        """Send one request and record its end."""
        stream = self.random.random() < 0.5
        body = {"model": "m", "messages": [{"role": "user", "content": "x"}], "stream": stream, "max_tokens": 5}
        before, started = len(self.a.asked), time.monotonic()
        answer = await self.http.post("/v1/chat/completions", json=body)
        self.latencies_s.append(time.monotonic() - started)
        self.at_a.append(len(self.a.asked) > before)
        broken = answer.status_code == 200 and b'"error"' in answer.content
        self.ends["broken stream" if broken else str(answer.status_code)] += 1

    async def run(self, requests: int, clients: int) -> None:
        """Send ``requests`` requests by ``clients`` clients."""
        left = iter(range(requests))

        async def client() -> None:
            for _ in left:
                await self.ask()

        await asyncio.gather(*(client() for _ in range(clients)))


async def measure(fault: str, requests: int, clients: int, seed: int) -> dict[str, Any]:
    """Return what happened with ``fault`` on the first of two engines."""
    a, b = FaultyServer(fault=fault, seed=seed), FaultyServer()
    async with AsyncExitStack() as stack:
        urls = [await stack.enter_async_context(serve(server)) for server in (a, b)]
        config = parse(
            {
                "engines": [
                    {"kind": "http", "name": name, "base_url": url} for name, url in zip("AB", urls, strict=True)
                ],
                "predictor": {"enabled": False, "expected_tokens": 5},
                "classes": {"chat": {"ttft_ms": TTFT_MS}},
                "default_class": "chat",
            }
        )
        gateway = Gateway(config, [HttpEngine(name, url) for name, url in zip("AB", urls, strict=True)])
        await gateway.start()
        stack.push_async_callback(gateway.stop)
        url = await stack.enter_async_context(serve(gateway))
        http = await stack.enter_async_context(httpx.AsyncClient(base_url=url, timeout=60, trust_env=False))
        load = Load(http, a, b, random.Random(seed))
        circuit, started = gateway.engine_queues[0].circuit, time.monotonic()
        running = asyncio.create_task(load.run(requests, clients))
        left_s = await _seconds_until(lambda: circuit.opened > 0 or running.done(), started)
        await running
        asked, rests = len(a.asked), circuit.opened
        ended, latencies = dict(load.ends), sorted(load.latencies_s)
        return {
            "fault": fault,
            "requests": requests,
            "succeeded": ended.get("200", 0),
            "ends": ended,
            "p50_ms": round(latencies[len(latencies) // 2] * 1000, 1),
            "max_ms": round(latencies[-1] * 1000, 1),
            "leaves_s": round(left_s, 3) if rests else None,
            "asked_a": asked,
            "rests": rests,
            "returns_s": await _returns_s(load, a, clients),
        }


async def _seconds_until(condition: Any, started: float) -> float:
    while not condition():
        await asyncio.sleep(0.001)
    return time.monotonic() - started


async def _returns_s(load: Load, a: FaultyServer, clients: int) -> float | None:
    """Heal A, go on with the load, and return the seconds until A has its share; None if it takes too long."""
    a.fault, healed = "", time.monotonic()
    while time.monotonic() - healed < RETURN_LIMIT_S:
        before = len(a.asked)
        await load.run(RETURN_WINDOW, clients)
        if len(a.asked) - before >= RETURN_SHARE * RETURN_WINDOW:
            return round(time.monotonic() - healed, 1)
    return None


def page(found: dict[str, Any]) -> str:
    """The page: the set-up, the command, and the table."""
    made_with = found["made_with"]
    rows = []
    for row in found["faults"]:
        others = ", ".join(f"{count} x {end}" for end, count in sorted(row["ends"].items()) if end != "200") or "none"
        leaves = "-" if row["leaves_s"] is None else f"{row['leaves_s']:.2f}"
        returns = "-" if row["returns_s"] is None else f"{row['returns_s']:.1f}"
        name = f"`{row['fault']}`" + (f": {MEANINGS[row['fault']]}" if row["fault"] in MEANINGS else "")
        served = f"{row['succeeded']} of {row['requests']}"
        times = [f"{row['p50_ms']:,.0f}", f"{row['max_ms']:,.0f}"]
        rows.append([name, served, others, *times, leaves, str(row["asked_a"]), returns])
    heads = ["fault of A", "served", "other ends", "median ms", "longest ms"]
    heads += ["rests after s", "requests to A", "back after s"]
    text = f"""# Failover between two engines

Two scripted servers behind one gateway with its default settings, over HTTP on one machine with two shared cores. No
model runs: a response is five tokens, 2 ms each. {made_with["clients"]} clients send one request after the other, half
of them streamed, with a TTFT bound of {TTFT_MS / 1000:g} s. Engine A has the fault from the start, B is healthy. Seed
{made_with["seed"]}.

- *rests after*: seconds from the first request until A gets no more traffic, except probes.
- *requests to A*: requests that A was sent while it had the fault, probes included.
- *back after*: seconds from the repair of A until it gets {RETURN_SHARE:.0%} of the requests again; "-": not within
  {RETURN_LIMIT_S:g} s.

```
python -m benchmarks.faults.study --json > docs/results/failover.json
python -m benchmarks.faults.study --page docs/results/failover.json
```

{table(heads, rows)}

A stream that breaks after its first token cannot be sent again, so `cut` fails until A rests. A hanging engine is left
after half of the TTFT bound. [How failover works](../failover.md).
"""
    return wrapped(text) + "\n"


def main(
    fault: Annotated[list[str] | None, typer.Option(help="Repeat for several. [default: all]")] = None,
    requests: Annotated[int, typer.Option(min=1, help="Requests while A has the fault.")] = 500,
    clients: Annotated[int, typer.Option(min=1, help="Clients at the same time.")] = 8,
    seed: Annotated[int, typer.Option(help="Seed of the faults and of the requests.")] = 0,
    as_json: AsJson = False,
    page_of: PageOf = None,
) -> None:
    """Measure failover with every fault on this machine."""
    if page_of is not None:
        write_page(page_of, page)
        return
    rows = []
    for name in chosen("--fault", fault, FAULTS):
        rows.append(asyncio.run(measure(name, requests, clients, seed)))
        sys.stderr.write(f"{rows[-1]}\n")
    found = {"made_with": {"requests": requests, "clients": clients, "seed": seed}, "faults": rows}
    print_results(found, as_json, page)


if __name__ == "__main__":
    typer.run(main)
