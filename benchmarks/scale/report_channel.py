"""Paced requests at a remote server whose slots best-effort requests hold, with and without the report channel.

    python -m benchmarks.scale.report_channel --json > docs/results/report_channel.json
    python -m benchmarks.scale.report_channel --page docs/results/report_channel.json

One real vLLM on CPU with a small random model, our scheduler class and the report channel. Two gateways with the
default policy stand before it: only one connects to the channel. They take turns. Then the cost of a report is measured
(`benchmarks.scale.report_cost`). A run takes five minutes.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import httpx
import numpy as np
import psutil
import typer

from benchmarks.command import AsJson, PageOf, print_results, write_page
from benchmarks.faults.rig import Rig, free_port, until
from benchmarks.live.dummy_model import write_dummy_model
from benchmarks.scale import report_page
from benchmarks.scale.report_cost import KEY, MEASURED_S, STEPS_MS, message_cost
from benchmarks.scale.servers import LIMIT_S, stop
from engine_adapter.report_channel.server import ADDRESS_ENV, KEY_ENV

ARMS = ("without", "with")
"""Gateways: without the report channel, and with it."""

MODEL = "small"
SLOTS = 8
BATCH_CLIENTS = 12
"""Best-effort clients, each with one request after the other: all slots are taken, and some requests wait."""
BATCH_TOKENS = (300, 900)
"""Shortest and longest best-effort answer."""
PACED_EVERY_S, PACED_TOKENS = 0.7, 8
"""Seconds between two paced requests, and the tokens of each."""
SETTLE_S, MEASURED_ROUND_S = 4.0, 20.0
"""Seconds from full slots to the first paced request, and of paced requests, in each round."""
SOON_S = 1.0
"""TTFT (s) within which the page counts paced requests. The bound is far longer, so that none is rejected: a rejected
request has no TTFT."""

CLASSES: dict[str, Any] = {"paced": {"ttft_ms": 60_000, "tpot_ms": 2000}, "free": {}}
GATEWAY_KEY_ENV = "REPORT_KEY_OF_THE_STUDY"


@dataclass(slots=True)
class Paced:
    """What a client saw of a paced request. ``ttft_s`` is None without a first token."""

    status: int = 0
    ttft_s: float | None = None
    complete: bool = False


@dataclass
class Study:
    """The running server and both gateways."""

    url: str
    gateways: dict[str, Rig] = field(default_factory=dict)

    async def metric(self, base: str, name: str) -> float:
        """Return the sum of the samples called ``name`` in ``/metrics`` of ``base``."""
        async with httpx.AsyncClient(trust_env=False, timeout=30) as http:
            lines = (await http.get(f"{base}/metrics")).text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith((f"{name}{{", f"{name} ")))

    async def running(self) -> float:
        """Return how many sequences the server runs."""
        return await self.metric(self.url, "vllm:num_requests_running")


def say(line: str) -> None:
    """Write a line of progress."""
    sys.stderr.write(f"{line}\n")


async def measure(rounds: int, seed: int, round_s: float) -> list[dict[str, Any]]:
    """Return a record for each round and gateway."""
    records = []
    with tempfile.TemporaryDirectory(prefix="antares-report-", ignore_cleanup_errors=True) as name:
        async with _study(Path(name)) as study:
            for number in range(rounds):
                # Each goes first in turn.
                for arm in ARMS if number % 2 == 0 else ARMS[::-1]:
                    records.append(await _round(study, arm, number, seed, round_s))
                    say(f"{records[-1]}")
    return records


@contextlib.asynccontextmanager
async def _study(folder: Path) -> AsyncIterator[Study]:
    """Start the server and both gateways."""
    port, report_port = free_port(), free_port()
    study = Study(f"http://127.0.0.1:{port}")
    model = write_dummy_model(folder / "model")
    words = [sys.executable, "-m", "engine_adapter.vllm.cpu_server", "--model", str(model), "--port", str(port)]
    words += ["--served-model-name", MODEL, "--load-format", "dummy", "--max-num-seqs", str(SLOTS)]
    words += ["--no-enable-prefix-caching"]
    environment = {**os.environ, ADDRESS_ENV: f"127.0.0.1:{report_port}", KEY_ENV: KEY}
    say("==> starting vLLM on CPU, which takes a minute")
    # Its errors appear on stderr.
    server = await asyncio.create_subprocess_exec(*words, stdout=asyncio.subprocess.DEVNULL, env=environment)
    try:
        await until(lambda: _healthy(server, study.url), LIMIT_S, 0.5)
        for arm in ARMS:
            (folder / arm).mkdir()
            study.gateways[arm] = await _gateway(folder / arm, study.url, report_port if arm == "with" else None)
        yield study
    finally:
        for gateway in study.gateways.values():
            await gateway.stop()
        await stop(server)


async def _healthy(server: asyncio.subprocess.Process, url: str) -> bool:
    if server.returncode is not None:
        raise RuntimeError(f"vLLM ended with {server.returncode}")
    with contextlib.suppress(httpx.TransportError):
        async with httpx.AsyncClient(trust_env=False, timeout=5) as http:
            answer = await http.get(f"{url}/health")
            return bool(answer.status_code == 200)
    return False


async def _gateway(folder: Path, url: str, report_port: int | None) -> Rig:
    engine: dict[str, Any] = {"kind": "http", "name": "vllm", "base_url": url, "max_num_seqs": SLOTS}
    if report_port is not None:
        engine["report"] = {"port": report_port, "key_env": GATEWAY_KEY_ENV}
    port = free_port()
    document = {
        "server": {"port": port, "drain_s": 5},
        "engines": [engine],
        "predictor": {"enabled": False, "expected_tokens": sum(BATCH_TOKENS) // 2},
        "classes": CLASSES,
        "default_class": "free",
    }
    running = Rig("http", folder, document, port, SLOTS, {}, model=MODEL, environment={GATEWAY_KEY_ENV: KEY})
    await running.start()
    expected = "metrics" if report_port is None else "channel"
    await until(lambda: _reports(running, expected), 30)
    return running


async def _reports(running: Rig, expected: str) -> bool:
    return bool((await running.status())["engines"][0]["reports"] == expected)


async def _round(study: Study, arm: str, number: int, seed: int, round_s: float) -> dict[str, Any]:
    """Hold all slots with best-effort requests, send paced ones, and return what their clients saw."""
    gateway = study.gateways[arm]
    base = f"http://127.0.0.1:{gateway.port}"
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=base, trust_env=False, timeout=LIMIT_S, limits=limits) as http:
        batch = [asyncio.create_task(_batch_client(http, f"{seed} {number} {each}")) for each in range(BATCH_CLIENTS)]
        try:
            await until(lambda: _full(study), 60)
            await asyncio.sleep(SETTLE_S)
            preempted, tokens = await _counts(study, base)
            started = time.monotonic()
            paced: list[asyncio.Task[Paced]] = []
            for index in range(round(round_s / PACED_EVERY_S)):
                await asyncio.sleep(max(0.0, started + index * PACED_EVERY_S - time.monotonic()))
                paced.append(asyncio.create_task(_paced(http)))
            seen = await asyncio.gather(*paced)
            elapsed_s = time.monotonic() - started
            preempted_after, tokens_after = await _counts(study, base)
        finally:
            for task in batch:
                task.cancel()
            ends = await asyncio.gather(*batch, return_exceptions=True)
        failed = [end for end in ends if isinstance(end, Exception)]
    await until(lambda: _idle(study), 60)
    ttft = [one.ttft_s for one in seen if one.ttft_s is not None]
    return {
        "arm": arm,
        "round": number,
        "paced": len(seen),
        "served": sum(one.complete for one in seen),
        "rejected": sum(one.status == 429 for one in seen),
        "ttft_s": [round(value, 4) for value in ttft],
        "soon": sum(value <= SOON_S for value in ttft),
        "ttft_p50_s": round(float(np.quantile(ttft, 0.5)), 4) if ttft else None,
        "ttft_p99_s": round(float(np.quantile(ttft, 0.99)), 4) if ttft else None,
        "preemptions": preempted_after - preempted,
        "tokens_per_s": round((tokens_after - tokens) / elapsed_s, 1),
        "batch_clients_failed": [f"{type(error).__name__}: {error}" for error in failed],
    }


async def _full(study: Study) -> bool:
    return await study.running() >= SLOTS


async def _idle(study: Study) -> bool:
    return await study.running() == 0


async def _counts(study: Study, base: str) -> tuple[float, float]:
    """Return the best-effort preemptions that the gateway knows, and the tokens that the server has generated."""
    preempted = await study.metric(base, "antares_best_effort_preemptions_total")
    return preempted, await study.metric(study.url, "vllm:generation_tokens_total")


async def _batch_client(http: httpx.AsyncClient, seed: str) -> None:
    """Send one best-effort request after the other. The first one is short or long, so that not all end at once."""
    choices, least = random.Random(seed), 1
    while True:
        body = _body(choices.randint(least, BATCH_TOKENS[1]))
        async with http.stream("POST", "/v1/completions", json=body, headers={"x-slo-class": "free"}) as response:
            if response.status_code != 200:
                raise RuntimeError(f"a best-effort request got {response.status_code}: {await response.aread()!r}")
            async for _ in response.aiter_bytes():
                pass
        least = BATCH_TOKENS[0]


async def _paced(http: httpx.AsyncClient) -> Paced:
    seen, sent = Paced(), time.monotonic()
    headers = {"x-slo-class": "paced"}
    async with http.stream("POST", "/v1/completions", json=_body(PACED_TOKENS), headers=headers) as response:
        seen.status = response.status_code
        async for line in response.aiter_lines():
            if line.startswith("data: {") and seen.ttft_s is None and "error" not in json.loads(line[6:]):
                seen.ttft_s = time.monotonic() - sent
            seen.complete |= line == "data: [DONE]"
    return seen


def _body(tokens: int) -> dict[str, Any]:
    return {"model": MODEL, "prompt": "one two three", "max_tokens": tokens, "ignore_eos": True, "stream": True}


def problems(records: list[dict[str, Any]], costs: list[dict[str, Any]]) -> list[str]:
    """Return the checks that a run fails, one line each."""
    found = []
    for record in records:
        where = f"round {record['round']} {record['arm']} the channel"
        if record["served"] < record["paced"]:
            found.append(f"{where}: {record['paced'] - record['served']} paced requests were not served")
        if record["batch_clients_failed"]:
            found.append(f"{where}: {record['batch_clients_failed'][0]}")
        if record["arm"] == "with" and not record["preemptions"]:
            found.append(f"{where}: no best-effort request was preempted")
        if record["arm"] == "without" and record["preemptions"]:
            found.append(f"{where}: best-effort requests were preempted")
    return found + [
        f"steps of {cost['step_ms']} ms: {cost['received_steps']} of {cost['steps']} were received"
        for cost in costs
        if cost["received_steps"] != cost["steps"]
    ]


def main(
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of both gateways.")] = report_page.DEFAULT_ROUNDS,
    seed: Annotated[int, typer.Option(help="Seed of the lengths of best-effort answers.")] = 0,
    round_s: Annotated[float, typer.Option(min=1, help="Seconds of paced requests in a round.")] = MEASURED_ROUND_S,
    cost_s: Annotated[float, typer.Option(min=0.1, help="Seconds for each step time.")] = MEASURED_S,
    as_json: AsJson = False,
    page_of: PageOf = None,
) -> None:
    """Measure TTFT with and without the report channel, and the cost of a report. Exit code 1 if a check fails."""
    if page_of is not None:
        write_page(page_of, report_page.page)
        return
    records = asyncio.run(measure(rounds, seed, round_s))
    say("==> measuring the cost of a report")
    costs = [message_cost(step_ms, cost_s) for step_ms in STEPS_MS]
    failed = problems(records, costs)
    settings = {"slots": SLOTS, "batch_clients": BATCH_CLIENTS, "batch_tokens": list(BATCH_TOKENS)}
    settings |= {"paced_every_s": PACED_EVERY_S, "paced_tokens": PACED_TOKENS, "soon_s": SOON_S}
    found = {"seed": seed, "rounds": rounds, "round_s": round_s, "cpus": psutil.cpu_count(), **settings}
    print_results({**found, "records": records, "costs": costs, "problems": failed}, as_json, report_page.page)
    say("\n".join(f"FAILED: {line}" for line in failed) or "all checks hold")
    raise typer.Exit(int(bool(failed)))


if __name__ == "__main__":
    typer.run(main)
