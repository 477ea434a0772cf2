"""What one tenant can do to another over HTTP: the victim's adherence alone, and beside each kind of abuse.

    python -m benchmarks.isolation.http --seed 0 --json > docs/results/isolation_http.json
    python -m benchmarks.isolation.http --page docs/results/isolation_http.json

Gateway, victim and abuser are processes of their own on this machine. The engine is simulated.
"""

from __future__ import annotations

import asyncio
import json
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from statistics import median
from typing import Annotated, Any

import httpx
import typer

from benchmarks.command import AsJson, PageOf, print_results, write_page
from benchmarks.isolation import http_slow
from benchmarks.isolation.http_abuse import ABUSES, FLOOD_PER_S
from benchmarks.isolation.http_gateway import ABUSER_KEY, CONFIG, SLOTS, VICTIM_KEY
from benchmarks.isolation.http_victim import PER_S, run_victim
from benchmarks.markdown import table, wrapped

WARM_S, SAMPLE_S = 3.0, 0.5
"""Seconds for which the victim runs before the abuse, and between two looks at the metrics."""

SLOW_CLIENTS = 20

_PEAKS = {
    "antares_connections ": "connections",
    "antares_response_buffer_bytes ": "response_bytes",
    "antares_body_memory_bytes ": "body_bytes",
    "antares_pass_through_requests{": "pass_through",
    "process_resident_memory_bytes ": "resident_bytes",
}


@asynccontextmanager
async def gateway(**limits: float) -> AsyncIterator[int]:
    """Run the gateway of the study in a process, with changed ``limits``. Yields its port."""
    command = [sys.executable, "-m", "benchmarks.isolation.http_gateway", json.dumps(limits)]
    process = await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield int(await process.stdout.readline())
    finally:
        process.stdin.close()
        await process.wait()


async def _abuse(kind: str, port: int, seconds: float) -> Process:
    command = [sys.executable, "-m", "benchmarks.isolation.http_abuse", kind, str(port), ABUSER_KEY, str(seconds)]
    return await asyncio.create_subprocess_exec(*command, stdout=PIPE)


async def measure(kind: str, seconds: float, seed: int) -> dict[str, Any]:
    """Return what the victim and the abuser of ``kind`` saw; "" is the victim alone."""
    async with gateway() as port:
        url = f"http://127.0.0.1:{port}"
        running = asyncio.create_task(run_victim(url, VICTIM_KEY, seconds, seed, WARM_S))
        await asyncio.sleep(WARM_S)
        abuser = await _abuse(kind, port, seconds) if kind else None
        peaks: dict[str, float] = {}
        async with httpx.AsyncClient(base_url=url, timeout=20, trust_env=False, verify=False) as http:
            while not running.done():
                _note_peaks(peaks, (await http.get("/metrics")).text)
                await asyncio.wait({running}, timeout=SAMPLE_S)
        seen = json.loads((await abuser.communicate())[0]) if abuser is not None else {}
    victim = running.result()
    times = victim.ttft_s
    return {
        "kind": kind, "requests": len(victim.requests), "adherence": round(victim.adherence, 4),
        "settled": round(victim.settled, 4), "ends": victim.ends,
        "ttft_p50_ms": round(1000 * median(times)) if times else None,
        "ttft_p99_ms": round(1000 * times[int(0.99 * len(times))]) if times else None,
        "abuser": dict(sorted(seen.items())), "peaks": peaks,
    }  # fmt: skip


def _note_peaks(peaks: dict[str, float], exposition: str) -> None:
    for line in exposition.splitlines():
        for start, name in _PEAKS.items():
            if line.startswith(start):
                peaks[name] = max(peaks.get(name, 0), int(float(line.rpartition(" ")[2])))


def page(found: dict[str, Any]) -> str:
    """The page: the set-up, the command, and the tables."""
    made_with, runs = found["made_with"], {run["kind"]: run for run in found["runs"]}
    rows = []
    for kind, run in runs.items():
        peaks = run["peaks"]
        says = (ABUSES[kind].__doc__ or "").rstrip(".") if kind else "None: the victim alone"
        held = [f"{peaks['connections']:,}", f"{peaks['pass_through']}"]
        held += [f"{peaks[name] / (1 << 20):.1f}" for name in ("response_bytes", "body_bytes")]
        held.append(f"{peaks['resident_bytes'] / (1 << 20):.0f}")
        seen = ", ".join(f"{count:,} x {end}" for end, count in run["abuser"].items()) or "-"
        times = [f"{run['ttft_p50_ms']:,}", f"{run['ttft_p99_ms']:,}"]
        rows.append([says, f"{run['adherence']:.3f}", f"{run['settled']:.3f}", *times, seen, *held])
    heads = ["abuse", "victim's adherence", "after 3 s", "TTFT p50 ms", "p99 ms", "the abuser saw"]
    heads += ["connections", "pass-through", "responses MiB", "bodies MiB", "memory MiB"]
    slow = []
    for row in found["slow"]:
        span = f"{row['shortest_s']:.1f} to {row['longest_s']:.1f}"
        slow.append([row["says"], f"{row['limit']}, {row['limit_s']:g}", span, ", ".join(row["answers"])])
    server, limits = CONFIG["server"], CONFIG["limits"]
    numbers = {
        "slots": SLOTS, "rate": f"{PER_S:g}", "times": f"{FLOOD_PER_S / PER_S:g}",
        "seconds": f"{made_with['seconds']:g}", "seed": made_with["seed"],
        "connections": f"{limits['max_connections']:,}", "open": f"{server['max_open_requests']:,}",
        "passing": server["max_pass_through"], "bodies": limits["body_memory_bytes"] >> 20,
        "clients": made_with["slow_clients"], "abuses": table(heads, rows), "notes": " ".join(found.get("notes", [])),
        "slow": table(["client sends", "limit, s", "cut after s", "answer"], slow),
    }  # fmt: skip
    return wrapped(_PAGE.format(**numbers)) + "\n"


_PAGE = """# Isolation between tenants over HTTP

Victim, abuser and gateway are processes on one machine with two shared cores, over real HTTP. The engine is simulated,
with {slots} slots. The victim offers {rate} requests/s on new connections, a quarter of them calls to `/v1/embeddings`.
Every run takes {seconds} s, seed {seed}. The flood is {times} times as much. Limits: {connections} connections, {open}
open requests, {passing} pass-through slots, {bodies} MiB for bodies.

The columns from *connections* on are the most that the gateway held. The abuser has its own address and key. Its
stalled readers use a class without bounds, the rest the victim's class. *After 3 s* is the adherence without the
start of the abuse. The bounds are a TTFT of 1 s and a TPOT of 100 ms at the client, and 2 s for embeddings.

```
python -m benchmarks.isolation.http --seed {seed} --json > docs/results/isolation_http.json
python -m benchmarks.isolation.http --page docs/results/isolation_http.json
```

{abuses}

{notes}

## When are slow senders cut?

{clients} clients of each kind at once. Time limits are checked twice a second. A body that arrives steadily has 60 s,
and 1 s for each MiB of `server.max_body_bytes`.

{slow}

[Which limits there are](../limits.md).
"""


def main(
    kind: Annotated[list[str] | None, typer.Option(help="Only these kinds of abuse.")] = None,
    seconds: Annotated[float, typer.Option(help="Seconds of each abuse.")] = 20.0,
    seed: Annotated[int, typer.Option(help="Seed of the victim's arrivals.")] = 0,
    as_json: AsJson = False,
    page_of: PageOf = None,
) -> None:
    """Measure every kind of abuse on this machine. Takes six minutes."""
    if page_of is not None:
        write_page(page_of, page)
        return
    runs = []
    for name in ["", *(kind or ABUSES)]:
        runs.append(asyncio.run(measure(name, seconds, seed)))
        sys.stderr.write(f"{runs[-1]}\n")
    slow = asyncio.run(_slow()) if not kind else []
    made_with = {"seconds": seconds, "seed": seed, "slow_clients": SLOW_CLIENTS}
    found = {"made_with": made_with, "runs": runs, "slow": slow}
    print_results(found, as_json, page)


async def _slow() -> list[dict[str, Any]]:
    async with gateway(**http_slow.LIMITS) as port:
        return await http_slow.measure(port, ABUSER_KEY, SLOW_CLIENTS)


if __name__ == "__main__":
    typer.run(main)
