"""A gateway at twice its capacity while clients disconnect and random parts break.

    python -m benchmarks.faults.soak --minutes 10 --json > docs/results/soak.json
    python -m benchmarks.faults.soak --minutes 3 --engine vllm --json > docs/results/soak_vllm.json
    python -m benchmarks.faults.soak --page docs/results/soak.json

By default the engine is a simulated server, which is a process of its own behind ``kind: http``. It reports the slope
of the gateway's memory after a warm-up, its descriptors, and whether the ledger balances with what clients saw.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import typer
import yaml

from benchmarks import results_json
from benchmarks.faults.checks import Ends, snapshot, verdict
from benchmarks.faults.client import HUNG_UP, Reply, chat, exchange
from benchmarks.faults.fault import recovered
from benchmarks.faults.mutate import mutation
from benchmarks.faults.rig import LIMITS, Rig, child_of, descriptors, memory_mb, rig, vllm_rig
from benchmarks.markdown import table, wrapped

Engine = Literal["simulated", "vllm"]
VLLM_MODEL = "smollm2-135m-instruct"

LOAD = 2.0
"""Requests offered, as a multiple of what the engine completes."""

DISCONNECTS = 0.05
"""Share of the clients that disconnect."""

TOKENS = (10, 70)
"""Range of output lengths."""

SLOTS, STEP_S = 16, 0.02
"""Batch and step time (s) of the simulated server: about 20 requests a second."""

CALIBRATING = 16
"""Most clients that measure the capacity. A real vLLM on CPU would serve many more, each too slowly."""

WARM_UP = 0.25
"""Share of the time before the slope of the memory is measured. Caches, records and pools fill meanwhile."""

FAULT_EVERY_S = (2.0, 6.0)
"""Range of the time (s) between two faults."""

CLASSES: dict[str, Any] = {
    "interactive": {"ttft_ms": 2000, "tpot_ms": 150},
    "chat": {"ttft_ms": 5000, "tpot_ms": 300},
    "batch": {"ttft_ms": 30_000, "on_unattainable": "best_effort", "max_waiting": 100},
}
"""The classes, in equal parts. The queue of `batch` is short, so that its requests end within `ANSWER_S`."""

KEPT = 1000
"""Records of ended requests that the gateway keeps. By default 10,000, which takes minutes to fill."""

ANSWER_S = 120.0
"""Longest time (s) of a request."""


@dataclass(slots=True)
class Soak:
    """One soak: the gateway, what its clients saw, and what broke how often.

    ``samples``: (seconds, MB, descriptors) of the gateway process.
    """

    running: Rig
    random: random.Random
    ends: Ends = field(default_factory=Ends)
    faults: Counter[str] = field(default_factory=Counter)
    samples: list[tuple[float, float, int]] = field(default_factory=list)

    # --- load ---------------------------------------------------------------------------------------------------------

    async def ask(self) -> None:
        """Send one request. Some clients disconnect."""
        r = self.random
        body = chat(
            model=self.running.model,
            stream=r.random() < 0.6,
            max_tokens=r.randint(*TOKENS),
            ignore_eos=True,
            headers={"x-slo-class": r.choice(list(self.running.config["classes"]))},
        )
        if r.random() < DISCONNECTS:
            call = exchange(self.running.port, body, limit_s=ANSWER_S, hang_up_at=r.choice([0, 200, 2000]))
            await self.ends.add_abuse(call)
        else:
            await self.ends.add(exchange(self.running.port, body, limit_s=ANSWER_S))

    async def send(self, rate: float, until: float) -> None:
        """Send requests at ``rate`` (1/s) until then (monotonic s), and wait for their ends."""
        async with asyncio.TaskGroup() as group:
            while time.monotonic() < until:
                group.create_task(self.ask())
                await asyncio.sleep(self.random.expovariate(rate))

    async def capacity(self, clients: int, seconds: float) -> float:
        """Return the requests that the engine completes per second, with so many clients."""
        stop, ends = time.monotonic() + seconds, Ends()

        async def client() -> None:
            while time.monotonic() < stop:
                body = chat(model=self.running.model, max_tokens=sum(TOKENS) // 2, ignore_eos=True,
                            headers={"x-slo-class": "batch"})  # fmt: skip
                await ends.add(exchange(self.running.port, body, limit_s=ANSWER_S))

        started = time.monotonic()
        await asyncio.gather(*(client() for _ in range(clients)))
        return ends.seen["200"] / (time.monotonic() - started)

    async def sample(self) -> None:
        """Note memory and descriptors every second."""
        pid, started = self.running.process.pid, time.monotonic()
        while True:
            self.samples.append((time.monotonic() - started, memory_mb(pid), descriptors(pid)))
            await asyncio.sleep(1)

    # --- faults -------------------------------------------------------------------------------------------------------

    async def break_things(self, until: float) -> None:
        """Inject one random fault after the other until then (monotonic s)."""
        faults: list[Callable[[], Awaitable[None]]] = [
            self.kill_predictor, self.pause_engine, self.read_nothing, self.send_garbage, self.reload,
        ]  # fmt: skip
        while time.monotonic() < until - FAULT_EVERY_S[1]:
            await asyncio.sleep(self.random.uniform(*FAULT_EVERY_S))
            fault = self.random.choice(faults)
            self.faults[fault.__name__.replace("_", " ")] += 1
            await fault()

    async def kill_predictor(self) -> None:
        """SIGKILL the predictor."""
        pid = self.running.predictor_pid()
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    async def pause_engine(self) -> None:
        """SIGSTOP the server or vLLM's EngineCore for up to three seconds."""
        running = self.running
        pid = running.server.pid if running.server else child_of(running.process.pid, "EngineCore")
        if pid is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
            try:
                await asyncio.sleep(self.random.uniform(0.3, 3.0))
            finally:
                os.kill(pid, signal.SIGCONT)

    async def read_nothing(self) -> None:
        """Eight clients ask for a stream and read nothing."""

        async def client() -> Reply:
            _, writer = await asyncio.open_connection("127.0.0.1", self.running.port, limit=1024)
            writer.write(chat(model=self.running.model, stream=True, max_tokens=200, ignore_eos=True))
            await asyncio.sleep(4)
            writer.transport.abort()
            return Reply(end=HUNG_UP)

        await asyncio.gather(*(self.ends.add_abuse(client()) for _ in range(8)))

    async def send_garbage(self) -> None:
        """Twenty mutated requests."""
        calls = [exchange(self.running.port, mutation(self.random).data, limit_s=ANSWER_S) for _ in range(20)]
        await asyncio.gather(*(self.ends.add_abuse(call) for call in calls))

    async def reload(self) -> None:
        """Reload a changed file, or a broken one."""
        text = yaml.safe_dump({**self.running.config, "failover": {"max_rest_s": self.random.randint(20, 40)}})
        self.running.write_config(self.random.choice([text, text, text + "\nx: [", "\0"]))
        self.running.signal(signal.SIGHUP)


def slope(samples: list[tuple[float, float, int]], since_s: float) -> float:
    """Return the slope of the memory (MB a minute) by least squares over the samples since then (s)."""
    times = np.array([at for at, _, _ in samples if at >= since_s])
    memory = np.array([mb for at, mb, _ in samples if at >= since_s])
    return float(np.polyfit(times / 60, memory, 1)[0]) if len(times) > 1 else 0.0


@contextlib.asynccontextmanager
async def gateway(engine: Engine, folder: Path) -> AsyncIterator[Rig]:
    """The gateway to soak."""
    predictor = {"timeout_ms": 50, "state_dir": str(folder / "state"), "expected_tokens": 40}
    sections: dict[str, Any] = {
        "predictor": predictor,
        "limits": LIMITS,
        "classes": CLASSES,
        "decisions": {"keep": KEPT},
    }
    times = {"b": 0.0, "d": STEP_S, "alpha": 1e-5}
    started = (
        vllm_rig(folder, VLLM_MODEL, **sections)
        if engine == "vllm"
        else rig("http", folder, slots=SLOTS, step_times=times, **sections)
    )
    async with started as running:
        yield running


async def measure(engine: Engine, minutes: float, seed: int, calibrate_s: float = 8.0) -> dict[str, Any]:
    """Soak a gateway for ``minutes``, and return what happened. Its capacity is measured for ``calibrate_s`` (s)."""
    with tempfile.TemporaryDirectory(prefix="antares-soak-") as name:
        async with gateway(engine, Path(name)) as running:
            soak = Soak(running, random.Random(seed))
            capacity = await soak.capacity(min(running.slots, CALIBRATING), calibrate_s)
            before = await snapshot(running)
            sampling = asyncio.create_task(soak.sample())
            end = time.monotonic() + 60 * minutes
            await asyncio.gather(soak.send(LOAD * capacity, end), soak.break_things(end))
            sampling.cancel()
            running.write_config()
            await recovered(running, soak.ends)
            left = await verdict(running, before, soak.ends)
            ledger = (await running.status())["ledger"]
    memory = [mb for _, mb, _ in soak.samples]
    return {
        "engine": engine,
        "minutes": minutes,
        "seed": seed,
        "capacity_per_s": round(capacity, 2),
        "requests": soak.ends.seen.total() + soak.ends.abusive.total(),
        "seen": dict(soak.ends.seen.most_common()),
        "abusive": dict(soak.ends.abusive.most_common()),
        "faults": dict(soak.faults.most_common()),
        "ledger": ledger,
        "memory_mb": {"start": round(before.memory_mb, 1), "peak": round(max(memory), 1), "end": round(memory[-1], 1)},
        "slope_mb_per_min": round(slope(soak.samples, WARM_UP * 60 * minutes), 2),
        "descriptors": {"before": before.descriptors, "peak": max(count for _, _, count in soak.samples),
                        "after": before.descriptors + left.leaked_descriptors},
        "lost": left.lost,
        "leaked_requests": left.leaked_requests,
        "leaked_descriptors": left.leaked_descriptors,
        "tracebacks": left.tracebacks,
    }  # fmt: skip


def page(found: dict[str, Any]) -> str:
    """The page: the set-up, the commands, and the tables."""
    heads = ["engine", "minutes", "requests", "lost", "leaked", "MB at start, peak, end", "MB a minute", "descriptors"]
    rows, ends = [], []
    for row in found["soaks"]:
        memory, opened = row["memory_mb"], row["descriptors"]
        rows.append(
            [
                row["engine"],
                f"{row['minutes']:g}",
                f"{row['requests']:,}",
                str(row["lost"]),
                f"{row['leaked_requests']} / {row['leaked_descriptors']}",
                f"{memory['start']:.0f}, {memory['peak']:.0f}, {memory['end']:.0f}",
                f"{row['slope_mb_per_min']:+.2f}",
                f"{opened['before']}, {opened['peak']}, {opened['after']}",
            ]
        )
        seen, faults = (", ".join(f"{n:,} x {name}" for name, n in row[key].items()) for key in ("seen", "faults"))
        ends.append([row["engine"], seen, faults, f"{row['ledger']['accepted']:,}, {row['ledger']['open']} open"])
    text = f"""# Soak

`antares serve` at {LOAD:g} times what its engine completes. {DISCONNECTS:.0%} of the clients disconnect. Every
{FAULT_EVERY_S[0]:g} to {FAULT_EVERY_S[1]:g} seconds one fault: the predictor is killed, the engine's process pauses for
up to three seconds, clients read nothing, requests are mutated, or the configuration is reloaded, sometimes broken.
The gateway keeps {KEPT:,} records.
*simulated*: a simulated server behind `kind: http`. *vllm*: the real engine of `make serve`, on CPU.

The slope of the memory is by least squares over the time after the first {WARM_UP:.0%}. Descriptors are those before,
at the peak, and after.

```
python -m benchmarks.faults.soak --minutes 10 --json > soak.json
python -m benchmarks.faults.soak --minutes 3 --engine vllm --json > soak_vllm.json
python -m benchmarks.faults.soak --page docs/results/soak.json --of soak.json --of soak_vllm.json
```

{table(heads, rows)}

{table(["engine", "clients saw", "faults", "ledger"], ends)}

[Every fault alone](faults.md). [What happens when a part fails](../faults.md).
"""
    return wrapped(text) + "\n"


def main(
    minutes: Annotated[float, typer.Option(min=0.1, help="Length of the soak.")] = 10.0,
    engine: Annotated[str, typer.Option(help="simulated or vllm.")] = "simulated",
    seed: Annotated[int, typer.Option(help="Seed of requests and faults.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document to stdout.")] = False,
    page_of: Annotated[
        Path | None, typer.Option("--page", help="Write the page beside this JSON file; measure nothing.")
    ] = None,
    of: Annotated[list[Path] | None, typer.Option(help="With --page: soaks that this file holds from now on.")] = None,
) -> None:
    """Soak a gateway. Exit code 1 if it lost or leaked something."""
    if page_of is not None:
        if of:
            documents = [json.loads(file.read_text(encoding="utf-8")) for file in of]
            results_json.write({"soaks": [row for document in documents for row in document["soaks"]]}, page_of)
        page_of.with_suffix(".md").write_text(page(json.loads(page_of.read_text(encoding="utf-8"))), encoding="utf-8")
        return
    if engine not in ("simulated", "vllm"):
        raise typer.BadParameter("use simulated or vllm", param_hint="--engine")
    row = asyncio.run(measure("vllm" if engine == "vllm" else "simulated", minutes, seed))
    sys.stdout.write(results_json.dumps({"soaks": [row]}) if as_json else page({"soaks": [row]}))
    bad = row["lost"] or row["leaked_requests"] or row["leaked_descriptors"] or row["tracebacks"]
    raise typer.Exit(int(bool(bad)))


if __name__ == "__main__":
    typer.run(main)
