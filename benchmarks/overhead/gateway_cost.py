"""Measures what the gateway adds per request and per token, in-process with the engine and in front of a server.

    python -m benchmarks.overhead.gateway_cost
    python -m benchmarks.overhead.gateway_cost --json > docs/results/gateway_cost.json
    python -m benchmarks.overhead.gateway_cost --page docs/results/gateway_cost.json

Three servers take turns, each in its own process, with a simulated engine whose steps all take the same time:

- *alone*: the engine behind uvicorn, without a gateway;
- *around*: `antares serve` with the engine in its process, as with ``kind: vllm``;
- *in front*: `antares serve` as a proxy of *alone*, as with ``kind: http``.

The servers and the load client use real HTTP on 127.0.0.1. The cost of the gateway is the CPU time of its process, for
*around* minus the CPU time of the engine alone. Answers of one token give the cost per request, long answers the cost
per token. The client measures the latencies.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Annotated, Any

import aiohttp
import numpy as np
import typer
import yaml
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks import results_json
from benchmarks.markdown import table as markdown_table
from benchmarks.markdown import wrapped
from lab.bench.client_request import ClientResult
from lab.bench.load_client import Target, send_from_another_process
from lab.workload import WorkloadRequest

SERVERS = ("alone", "around", "in front")
MODEL = "simulated"
PROMPT_TOKENS = 32
LOOSE_S = 100.0
"""TTFT and TPOT bounds in seconds that every request meets, so that none is rejected."""

_START_S = 30.0
"""Longest time for a server to start, in seconds."""
_TICK_S = 1 / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Case:
    """``requests`` arrive evenly over ``over_s`` (s) and get ``tokens`` each; steps take ``step_ms``."""

    name: str
    requests: int
    over_s: float
    tokens: int
    step_ms: float

    def workload(self) -> list[WorkloadRequest]:
        """The requests of the case."""
        return [
            WorkloadRequest(number * self.over_s / self.requests, PROMPT_TOKENS, self.tokens, LOOSE_S, LOOSE_S, 1)
            for number in range(self.requests)
        ]


CASES = (
    Case("100 one-token answers a second", 600, 6.0, 1, 4.0),
    Case("16 streams, steps of 4 ms", 16, 0.2, 1200, 4.0),
    Case("64 streams, steps of 20 ms", 64, 0.2, 250, 20.0),
    Case("64 streams, steps of 4 ms", 64, 0.2, 400, 4.0),
)
ONE_TOKEN = CASES[0].name


def step_times(step_ms: float) -> dict[str, float]:
    """Step-time coefficients with which every step takes ``step_ms``."""
    return {"b": 0.0, "d": step_ms / 1e3, "alpha": 0.0}


def gateway_config(engine: dict[str, Any], port: int) -> dict[str, Any]:
    """The configuration for ``antares serve``."""
    return {
        "server": {"port": port},
        "engines": [engine],
        "predictor": {"enabled": False, "expected_tokens": 256},
        "classes": {"loose": {"ttft_ms": LOOSE_S * 1e3, "tpot_ms": LOOSE_S * 1e3}},
        "default_class": "loose",
    }


@dataclass(slots=True)
class Server:
    """A server at ``url``; ``measured`` is the process whose CPU time counts."""

    url: str
    measured: asyncio.subprocess.Process

    def cpu_s(self) -> float:
        """CPU seconds of the process so far."""
        stat = Path(f"/proc/{self.measured.pid}/stat").read_text(encoding="ascii").rpartition(") ")[2].split()
        return (int(stat[11]) + int(stat[12])) * _TICK_S


@contextlib.asynccontextmanager
async def server(name: str, case: Case, folder: Path) -> AsyncIterator[Server]:
    """One of `SERVERS`, running until the block ends."""
    async with contextlib.AsyncExitStack() as stack:
        simulated = {"kind": "simulated", "model": MODEL, "step_times": step_times(case.step_ms)}
        if name == "around":
            yield await _antares(stack, simulated, folder)
            return
        port = free_port()
        command = [
            "-m",
            "benchmarks.overhead.gateway_cost",
            "--engine-alone",
            str(port),
            "--step-ms",
            str(case.step_ms),
        ]
        alone = Server(f"http://127.0.0.1:{port}", await start_process(stack, command))
        await until_up(alone, "/health")
        if name == "alone":
            yield alone
            return
        remote = {"kind": "http", "base_url": alone.url, "step_times": step_times(case.step_ms)}
        yield await _antares(stack, remote, folder)


async def _antares(stack: contextlib.AsyncExitStack, engine: dict[str, Any], folder: Path) -> Server:
    port = free_port()
    config = folder / f"{engine['kind']}.yaml"
    config.write_text(yaml.safe_dump(gateway_config(engine, port)), encoding="utf-8")
    process = await start_process(
        stack, ["-c", "from gateway.cli import main; main()", "serve", "--config", str(config)]
    )
    serving = Server(f"http://127.0.0.1:{port}", process)
    await until_up(serving, "/ready")
    return serving


async def start_process(
    stack: contextlib.AsyncExitStack, arguments: list[str], tree: Path | None = None
) -> asyncio.subprocess.Process:
    """Start Python with the code of ``tree``, a checkout of the project. ``stack`` ends the process."""
    quiet = asyncio.subprocess.DEVNULL
    env = os.environ if tree is None else {**os.environ, "PYTHONPATH": str(tree)}
    process = await asyncio.create_subprocess_exec(
        sys.executable, *arguments, stdout=quiet, stderr=quiet, cwd=tree, env=env
    )
    stack.push_async_callback(_end, process)
    return process


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.terminate()
        try:
            await asyncio.wait_for(process.wait(), 10)
        except TimeoutError:
            process.kill()
            await process.wait()


async def until_up(starting: Server, path: str) -> None:
    """Wait for status 200 at ``path``. Raises `RuntimeError` if the process ends first or `_START_S` passes."""
    deadline = time.monotonic() + _START_S
    async with aiohttp.ClientSession() as session:
        while time.monotonic() < deadline and starting.measured.returncode is None:
            with contextlib.suppress(aiohttp.ClientError):
                async with session.get(starting.url + path) as answer:
                    if answer.status == 200:
                        return
            await asyncio.sleep(0.05)
    raise RuntimeError(f"{starting.url} did not start")


def free_port() -> int:
    """Return a TCP port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def measure(name: str, case: Case, round_: int) -> dict[str, Any]:
    """Serve ``case`` once and return its record. Raises `RuntimeError` if an answer is incomplete."""
    with tempfile.TemporaryDirectory(prefix="antares-cost-") as folder:
        async with server(name, case, Path(folder)) as serving:
            target = Target(serving.url, MODEL, endpoint="chat")
            warm_up = Case("warm-up", 20, 0.2, 8, case.step_ms)
            await send_from_another_process(target, warm_up.workload(), round_)
            before = serving.cpu_s()
            sent = await send_from_another_process(target, case.workload(), round_)
            cpu_s = serving.cpu_s() - before
    check_answers(name, case, sent.answers)
    ttft = [answer.ttft_s for answer in sent.answers if answer.ttft_s is not None]
    tpot = [answer.tpot_s for answer in sent.answers]
    return {
        "server": name,
        "case": case.name,
        "round": round_,
        "cpu_us_a_request": 1e6 * cpu_s / case.requests,
        "cpu_us_a_token": 1e6 * cpu_s / (case.requests * case.tokens),
        "ttft_p50_ms": 1e3 * median(ttft),
        "ttft_p99_ms": 1e3 * float(np.quantile(ttft, 0.99)),
        "tpot_p50_ms": 1e3 * median(tpot),
    }


def check_answers(name: str, case: Case, answers: Sequence[ClientResult]) -> None:
    """Raise `RuntimeError` if a request lacks tokens, because an incomplete answer costs less."""
    broken = [a.reason or f"{a.tokens} tokens" for a in answers if a.outcome != "finished" or a.tokens != case.tokens]
    if broken:
        raise RuntimeError(f"{case.name}, {name}: {len(broken)} incomplete answers, the first: {broken[0]}")


def measured(rounds: int, cases: tuple[Case, ...]) -> Iterator[dict[str, Any]]:
    """The records of every case on every server, over ``rounds`` in which the servers take turns."""
    turns = [(name, case, at) for at in range(rounds) for case in cases for name in SERVERS]
    for turn in track(turns, "Serving", console=Console(stderr=True)):
        yield asyncio.run(measure(*turn))


def costs(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per case and kind of gateway: the cost added to the engine alone, mean over the rounds.

    ``cpu_us`` (standard deviation ``cpu_us_sd``) is CPU microseconds per request for one-token answers, else per token.
    ``ttft_p50_ms`` and ``ttft_p99_ms`` are added milliseconds. ``tpot_ratio`` is the ratio of the median TPOTs, None
    for one-token answers.
    """
    by_run = {(run["server"], run["case"], run["round"]): run for run in runs}
    rows = []
    for case in dict.fromkeys(run["case"] for run in runs):
        rounds = sorted({run["round"] for run in runs if run["case"] == case})
        cpu = "cpu_us_a_request" if case == ONE_TOKEN else "cpu_us_a_token"
        for name in SERVERS[1:]:
            pairs = [(by_run["alone", case, at], by_run[name, case, at]) for at in rounds]
            added = [gateway[cpu] - (alone[cpu] if name == "around" else 0.0) for alone, gateway in pairs]
            row: dict[str, Any] = {"server": name, "case": case, "of": cpu.removeprefix("cpu_us_a_")}
            row["cpu_us"], row["cpu_us_sd"] = fmean(added), stdev(added) if len(added) > 1 else 0.0
            row["alone_cpu_us"] = fmean(alone[cpu] for alone, _ in pairs)
            for key in ("ttft_p50_ms", "ttft_p99_ms"):
                row[key] = fmean(gateway[key] - alone[key] for alone, gateway in pairs)
            tpots = [(alone["tpot_p50_ms"], gateway["tpot_p50_ms"]) for alone, gateway in pairs]
            row["tpot_ratio"] = (
                fmean(ours / alone for alone, ours in tpots) if all(alone for alone, _ in tpots) else None
            )
            rows.append(row)
    return rows


_HEADS = ("case", "gateway", "added CPU µs", "CPU µs of engine alone", "added TTFT p50, ms", "p99, ms", "TPOT ratio")


def cells(row: dict[str, Any]) -> list[str]:
    """The cells of a row."""
    ratio = row["tpot_ratio"]
    return [
        row["case"],
        row["server"],
        f"{row['cpu_us']:,.0f} ({row['cpu_us_sd']:,.0f}) per {row['of']}",
        f"{row['alone_cpu_us']:,.0f}",
        f"{row['ttft_p50_ms']:+.1f}",
        f"{row['ttft_p99_ms']:+.1f}",
        "" if ratio is None else f"{ratio:.3f}",
    ]


def page(found: dict[str, Any]) -> str:
    """The page: the setup, the command, and the table."""
    text = f"""# Overhead of the gateway

**CPU.** Engine, gateway and load client share two cores. A simulated engine, real HTTP. Means (standard deviations) of
{found["rounds"]} rounds in which the servers take turns.

- *around*: the engine runs in the gateway's process, as with `kind: vllm`.
- *in front*: the gateway is a proxy of a server, as with `kind: http`.
- *added*: cost or latency in addition to the engine alone, which serves HTTP too.
- *TPOT ratio*: median TPOT over that of the engine alone.

```
python -m benchmarks.overhead.gateway_cost --json > docs/results/gateway_cost.json
python -m benchmarks.overhead.gateway_cost --page docs/results/gateway_cost.json
```

{markdown_table(_HEADS, [cells(row) for row in costs(found["runs"])])}
"""
    return wrapped(text) + "\n"


async def engine_alone(port: int, step_ms: float) -> None:
    """Serve a simulated engine, until the process is stopped."""
    import uvicorn

    from engine_adapter.engine import EngineEvents
    from engine_adapter.simulated.engine import SimulatedEngine
    from engine_adapter.step_time.linear_forms import StepTimes

    engine = SimulatedEngine(model=MODEL, times=StepTimes(**step_times(step_ms)))
    await engine.start(EngineEvents())
    config = uvicorn.Config(engine.app, port=port, lifespan="off", access_log=False, log_level="warning")
    await uvicorn.Server(config).serve()
    await engine.stop()


def main(
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; each serves every case on every server.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document to stdout.")] = False,
    page_of: Annotated[
        Path | None, typer.Option("--page", help="Write the page beside this JSON file; measure nothing.")
    ] = None,
    alone_at: Annotated[int | None, typer.Option("--engine-alone", hidden=True)] = None,
    step_ms: Annotated[float, typer.Option(hidden=True)] = 4.0,
) -> None:
    """Serve the same streams with and without the gateway, and report what the gateway adds."""
    if alone_at is not None:
        asyncio.run(engine_alone(alone_at, step_ms))
        return
    if page_of is not None:
        page_of.with_suffix(".md").write_text(page(json.loads(page_of.read_text(encoding="utf-8"))), encoding="utf-8")
        return
    runs = list(measured(rounds, CASES))
    if as_json:
        cases = [asdict(case) for case in CASES]
        sys.stdout.write(results_json.dumps({"rounds": rounds, "cases": cases, "runs": runs}))
        return
    drawn = Table(title="Overhead of the gateway")
    for head in _HEADS:
        drawn.add_column(head)
    for row in costs(runs):
        drawn.add_row(*cells(row))
    Console(width=max(Console().width, 112)).print(drawn)


if __name__ == "__main__":
    typer.run(main)
