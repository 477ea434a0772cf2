"""A gateway at twice the saturation of its engine while clients disconnect and random parts break.

    python -m benchmarks.faults.soak --minutes 10 --json > soak.json
    python -m benchmarks.faults.soak --minutes 3 --engine vllm --json > soak_vllm.json
    python -m benchmarks.faults.soak --page docs/results/soak.json --of soak.json --of soak_vllm.json

By default the engine is a simulated server, which is a process of its own behind ``kind: http``. After a warm-up under
the same load it measures the slope of the gateway's memory, its descriptors, and whether the ledger balances with what
clients saw. The exit code is 1 if one of them is wrong, and the reasons go to stderr.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from benchmarks import results_json
from benchmarks.command import AsJson, PageOf, print_results, write_page
from benchmarks.faults.checks import OUTCOMES, Ends, Snapshot, snapshot, verdict
from benchmarks.faults.client import HUNG_UP, NO_ANSWER, Reply, chat, exchange
from benchmarks.faults.fault import recovered
from benchmarks.faults.memory_slope import WINDOW_S, Point, levels, slope
from benchmarks.faults.mutate import mutation
from benchmarks.faults.rig import Rig, child_of, descriptors, memory_mb, until
from benchmarks.faults.soak_gateway import Engine, gateway
from benchmarks.faults.soak_page import page

LOAD = 2.0
"""Requests offered, as a multiple of what the saturated engine completes."""

DISCONNECTS = 0.05
"""Share of the clients that disconnect."""

TOKENS = (10, 70)
"""Range of output lengths, the same for all classes."""

CALIBRATE_S = 45.0
"""Time (s) in which the saturation is measured. After a third of it the clients no longer ask in step."""

FIRST_USES, AT_ONCE = 400, 40
"""Mutated requests before the warm-up, and how many of them at once. They reach code that loads on its first use: with
vLLM, grammars, tool parsers and other routes. During the measurement one such load of 1.5 MB looked like a leak."""

WARM_UP_MIN = 3.0
"""Warm-up (minutes) under the same load and faults. Caches, records and pools fill, and the allocator's pools grow."""

MAX_SLOPE = 1.0
"""Largest slope (MB a minute) that is no leak. The live feed fills for 15 minutes and the sliding windows for an hour,
which together is 0.3 MB a minute by tracemalloc. All else is allocator noise."""

EXPECTED = r"200|429 \w+|503 engine_(lost|unavailable)|200, then engine_lost"
"""Ends that clients may see. A pause is shorter than what counts as a hang, but a starved machine may lengthen it."""

PREDICTOR_S = 60.0
"""Longest time (s) until the predictor predicts again: its last restart waits up to 15 s."""

FAULT_EVERY_S = (2.0, 6.0)
"""Range of the time (s) between two faults."""

ANSWER_S = 600.0
"""Longest time (s) of a request, so that only a lost request takes longer. With vLLM, a request of `batch` has one slot
of three and gets 0.4 tokens a second. It waits for 60 s until it is overdue and for 200 s behind six others, and runs
for up to 175 s."""


@dataclass(slots=True)
class Soak:
    """One soak: the gateway, what its clients saw, and what broke how often.

    ``samples``: (monotonic seconds, MB, descriptors) of the gateway process. ``unanswered``: what the gateway says
    about requests that got no answer. ``longest_s``: the longest time to an answer (s).
    """

    running: Rig
    random: random.Random
    ends: Ends = field(default_factory=Ends)
    faults: Counter[str] = field(default_factory=Counter)
    samples: list[tuple[float, float, int]] = field(default_factory=list)
    sent: int = 0
    unanswered: list[str] = field(default_factory=list)
    longest_s: float = 0.0

    # --- load ---------------------------------------------------------------------------------------------------------

    async def ask(self) -> None:
        """Send one request. Some clients disconnect."""
        r = self.random
        self.sent += 1
        name, request_id = r.choice(list(self.running.config["classes"])), f"soak-{self.sent}"
        body = chat(
            model=self.running.model,
            stream=r.random() < 0.6,
            max_tokens=r.randint(*TOKENS),
            ignore_eos=True,
            headers={"x-slo-class": name, "x-request-id": request_id},
        )
        if r.random() < DISCONNECTS:
            call = exchange(self.running.port, body, limit_s=ANSWER_S, hang_up_at=r.choice([0, 200, 2000]))
            await self.ends.add_abuse(call)
            return
        started = time.monotonic()
        reply = await self.ends.add(exchange(self.running.port, body, limit_s=ANSWER_S))
        if reply.end == NO_ANSWER:
            self.unanswered.append(await self.explain(request_id))
        else:
            self.longest_s = max(self.longest_s, time.monotonic() - started)

    async def explain(self, request_id: str) -> str:
        """Return what the gateway did with a request: whether it waited or ran, and how far it got."""
        reply = await self.running.get(f"/v1/requests/{request_id}")
        if reply.status != 200:
            return f"unknown to the gateway: {reply.end}"
        found = json.loads(reply.body)
        tokens, attempts = found["output"]["tokens"], found["attempts"]
        admitted = [attempt["admitted_ms"] for attempt in attempts if attempt["admitted_ms"] is not None]
        text = f"{found['slo_class']}, {found['slo']['kind']}, "
        text += f"admitted after {admitted[-1] / 1000:.0f} s, {tokens} tokens" if admitted else "waited"
        return f"{text}, {len(attempts)} attempts, {found['outcome'] or found['state']}"

    async def send(self, rate: float, until: float) -> None:
        """Send requests at ``rate`` (1/s) until then (monotonic s), and wait for their ends."""
        async with asyncio.TaskGroup() as group:
            while time.monotonic() < until:
                group.create_task(self.ask())
                await asyncio.sleep(self.random.expovariate(rate))

    @property
    def saturating(self) -> int:
        """The clients that fill every slot of the engine and the queue of `batch`."""
        return int(self.running.slots + self.running.config["classes"]["batch"]["max_waiting"])

    async def saturation(self, seconds: float) -> float:
        """Return the best-effort requests that the engine completes per second, with `saturating` clients.

        They ask one after the other for ``seconds``, with the output lengths of the load.
        """
        started = time.monotonic()
        counted, stop = started + seconds / 3, started + seconds
        completed = 0

        async def client() -> None:
            nonlocal completed
            while time.monotonic() < stop:
                body = chat(model=self.running.model, max_tokens=self.random.randint(*TOKENS), ignore_eos=True,
                            headers={"x-slo-class": "batch"})  # fmt: skip
                reply = await exchange(self.running.port, body, limit_s=ANSWER_S)
                if reply.end != "200":
                    await asyncio.sleep(0.1)  # the queue was full
                completed += reply.end == "200" and counted <= time.monotonic() < stop

        await asyncio.gather(*(client() for _ in range(self.saturating)))
        return completed / (stop - counted)

    async def use_all(self) -> None:
        """Send `FIRST_USES` mutated requests. How they end is not judged."""
        room = asyncio.Semaphore(AT_ONCE)

        async def client(data: bytes) -> None:
            async with room:
                await exchange(self.running.port, data, limit_s=ANSWER_S)

        mutations = [mutation(self.random, self.running.model) for _ in range(FIRST_USES)]
        await asyncio.gather(*(client(each.data) for each in mutations))

    async def sample(self) -> None:
        """Note memory and descriptors every second, until the gateway's process ends."""
        pid = self.running.process.pid
        with contextlib.suppress(OSError):
            while True:
                self.samples.append((time.monotonic(), memory_mb(pid), descriptors(pid)))
                await asyncio.sleep(1)

    # --- faults -------------------------------------------------------------------------------------------------------

    async def break_things(self, until: float) -> None:
        """Inject a random fault at a time until then (monotonic s), and count each that took place."""
        faults: list[Callable[[], Awaitable[bool]]] = [
            self.kill_predictor, self.pause_engine, self.read_nothing, self.send_garbage, self.reload,
        ]  # fmt: skip
        while time.monotonic() < until - FAULT_EVERY_S[1]:
            await asyncio.sleep(self.random.uniform(*FAULT_EVERY_S))
            fault = self.random.choice(faults)
            if await fault():
                self.faults[fault.__name__.replace("_", " ")] += 1

    async def kill_predictor(self) -> bool:
        """SIGKILL the predictor. False if it is not up yet after the last kill."""
        pid = self.running.predictor_pid()
        if pid is None:
            return False
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        return True

    async def pause_engine(self) -> bool:
        """SIGSTOP the server or vLLM's EngineCore for up to three seconds. False while the EngineCore restarts."""
        running = self.running
        pid = running.server.pid if running.server else child_of(running.process.pid, "EngineCore")
        if pid is None:
            return False
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
            try:
                await asyncio.sleep(self.random.uniform(0.3, 3.0))
            finally:
                os.kill(pid, signal.SIGCONT)
        return True

    async def read_nothing(self) -> bool:
        """Eight clients ask for a stream and read nothing."""

        async def client() -> Reply:
            _, writer = await asyncio.open_connection("127.0.0.1", self.running.port, limit=1024)
            writer.write(chat(model=self.running.model, stream=True, max_tokens=200, ignore_eos=True))
            await asyncio.sleep(4)
            writer.transport.abort()
            return Reply(end=HUNG_UP)

        await asyncio.gather(*(self.ends.add_abuse(client()) for _ in range(8)))
        return True

    async def send_garbage(self) -> bool:
        """Twenty mutated requests."""
        mutations = [mutation(self.random, self.running.model) for _ in range(20)]
        calls = [exchange(self.running.port, each.data, limit_s=ANSWER_S) for each in mutations]
        replies = await asyncio.gather(*(self.ends.add_abuse(call) for call in calls))
        for each, reply in zip(mutations, replies, strict=True):
            if reply.end == NO_ANSWER:
                self.unanswered.append(f"{each.path}, mutated: {each.what}; {each.data[:600]!r}")
        return True

    async def reload(self) -> bool:
        """Reload a changed file, or a broken one."""
        text = yaml.safe_dump({**self.running.config, "failover": {"max_rest_s": self.random.randint(20, 40)}})
        self.running.write_config(self.random.choice([text, text, text + "\nx: [", "\0"]))
        self.running.signal(signal.SIGHUP)
        return True

    # --- afterwards ---------------------------------------------------------------------------------------------------

    async def settle(self, before: Snapshot) -> dict[str, Any]:
        """Wait until the gateway idles, and return what is left behind.

        Raises `RuntimeError` if it has died or still holds requests.
        """
        running = self.running
        if running.process.returncode is not None:
            raise RuntimeError(f"antares serve ended with {running.process.returncode}:\n{running.log[-4000:]}")
        running.write_config()
        await recovered(running, self.ends)
        try:
            left = await verdict(running, before, self.ends)
        except TimeoutError:
            raise RuntimeError(f"requests are left: {await running.status()}") from None
        predictor_up = True
        try:
            await until(lambda: self._metric_is("antares_predictor_up", 1), PREDICTOR_S, 0.5)
        except TimeoutError:
            predictor_up = False
        return {
            "ledger": (await running.status())["ledger"],
            "lost": left.lost,
            "leaked_requests": left.leaked_requests,
            "leaked_descriptors": left.leaked_descriptors,
            "descriptors": {
                "before": before.descriptors,
                "peak": max(count for _, _, count in self.samples),
                "after": descriptors(running.process.pid),
            },
            "tracebacks": left.tracebacks,
            "predictor_up": predictor_up,
            "engine_hangs": await self._metric("antares_engine_hangs_total"),
            "engine_restarts": await self._metric("antares_engine_restarts_total"),
        }

    async def _metric(self, name: str) -> int:
        """Return the sum of a metric over its labels."""
        text = (await self.running.get("/metrics")).body.decode()
        return int(sum(float(found) for found in re.findall(rf"^{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE)))

    async def _metric_is(self, name: str, value: int) -> bool:
        return await self._metric(name) == value


def problems(row: dict[str, Any]) -> list[str]:
    """Return what is wrong with a soak, one line each; empty if all is well."""
    ledger = row["ledger"]
    ended = sum(ledger[outcome] for outcome in OUTCOMES)
    zero = ("lost", "leaked_requests", "leaked_descriptors", "tracebacks", "engine_hangs")
    found = [f"{name}: {row[name]}" for name in zero if row[name]]
    found += [f"no answer: {each}" for each in row["unanswered"]]
    found += [f"{n} x {end}" for end, n in row["seen"].items() if not re.fullmatch(EXPECTED, end)]
    if ledger["open"] or ledger["accepted"] != ended:
        found.append(f"the ledger does not balance: {ledger}")
    if row["slope_mb_per_min"] > MAX_SLOPE:
        found.append(f"memory grows by {row['slope_mb_per_min']} MB a minute, above {MAX_SLOPE:g}")
    return found if row["predictor_up"] else [*found, f"the predictor is not back after {PREDICTOR_S:g} s"]


async def measure(
    engine: Engine, minutes: float, seed: int, warm_up_min: float = WARM_UP_MIN, calibrate_s: float = CALIBRATE_S
) -> dict[str, Any]:
    """Soak a gateway for ``minutes`` after the warm-up, and return what happened and what is wrong.

    The saturation of its engine is measured for ``calibrate_s`` (s) before.
    """
    with tempfile.TemporaryDirectory(prefix="antares-soak-") as name:
        async with gateway(engine, Path(name)) as running:
            soak = Soak(running, random.Random(seed))
            saturation = await soak.saturation(calibrate_s)
            await soak.use_all()
            before = await snapshot(running)
            sampling = asyncio.create_task(soak.sample())
            judged = time.monotonic() + 60 * warm_up_min
            end = judged + 60 * minutes
            await asyncio.gather(soak.send(LOAD * saturation, end), soak.break_things(end))
            left = await soak.settle(before)
            sampling.cancel()
    served = soak.ends.seen["200"] / (60 * (warm_up_min + minutes))
    points: list[Point] = [(at - judged, mb) for at, mb, _ in soak.samples if judged <= at <= end]
    row = {
        "engine": engine,
        "minutes": minutes,
        "warm_up_min": warm_up_min,
        "seed": seed,
        "clients": soak.saturating,
        "saturation_per_s": round(saturation, 2),
        "offered_per_s": round(LOAD * saturation, 2),
        "served_per_s": round(served, 2),
        "requests": soak.ends.seen.total() + soak.ends.abusive.total(),
        "seen": dict(soak.ends.seen.most_common()),
        "unanswered": soak.unanswered,
        "longest_s": round(soak.longest_s, 1),
        "abusive": dict(soak.ends.abusive.most_common()),
        "faults": dict(soak.faults.most_common()),
        "memory_mb": {"start": round(before.memory_mb, 1), "warm": round(levels(points)[0][1], 1),
                      "peak": round(max(mb for _, mb, _ in soak.samples), 1), "end": round(points[-1][1], 1)},
        "mb_each_minute": [round(mb, 1) for _, mb in levels(points)[:: round(60 / WINDOW_S)]],
        "slope_mb_per_min": round(slope(points), 2),
        **left,
    }  # fmt: skip
    return {**row, "problems": problems(row)}


def main(
    minutes: Annotated[float, typer.Option(min=0.1, help="Length of the soak after the warm-up.")] = 10.0,
    warm_up_min: Annotated[
        float, typer.Option("--warm-up", min=0.0, help="Minutes of the same load before the memory is judged.")
    ] = WARM_UP_MIN,
    engine: Annotated[Engine, typer.Option()] = "simulated",
    seed: Annotated[int, typer.Option(help="Seed of requests and faults.")] = 0,
    as_json: AsJson = False,
    page_of: PageOf = None,
    of: Annotated[list[Path] | None, typer.Option(help="With --page: soaks that this file holds from now on.")] = None,
) -> None:
    """Soak a gateway. Exit code 1 if it lost or leaked something."""
    if page_of is not None:
        if of:
            documents = [json.loads(file.read_text(encoding="utf-8")) for file in of]
            results_json.write({"soaks": [row for document in documents for row in document["soaks"]]}, page_of)
        write_page(page_of, page)
        return
    row = asyncio.run(measure(engine, minutes, seed, warm_up_min))
    found = {"soaks": [row]}
    print_results(found, as_json, page)
    for problem in row["problems"]:
        sys.stderr.write(f"problem: {problem}\n")
    raise typer.Exit(int(bool(row["problems"])))


if __name__ == "__main__":
    typer.run(main)
