"""What the gateway costs a request and a token: the same streams without it, around the engine, and in front of it.

    python -m benchmarks.overhead.gateway_cost
    python -m benchmarks.overhead.gateway_cost --json > docs/results/gateway_cost.json
    python -m benchmarks.overhead.gateway_cost --page docs/results/gateway_cost.json

Three servers take turns, each in a process of its own, with a simulated engine whose steps all take the same time:

- *alone*: the engine behind uvicorn, and nothing else;
- *around*: `antares serve` with the engine in its process, as with ``kind: vllm``;
- *in front*: `antares serve` before the first, as with ``kind: http``.

All speak real HTTP on 127.0.0.1, and so does the load client, in a process of its own. What the gateway costs is CPU
time of its process; around an engine, what that takes more than the engine alone. Answers of one token give the cost of
a request, long ones that of a token. Latencies are the client's.
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

from lab.bench.client_request import ClientResult
from lab.bench.load_client import Target, send_from_another_process
from lab.workload import WorkloadRequest

SERVERS = ("alone", "around", "in front")
MODEL = "simulated"
PROMPT_TOKENS = 32
LOOSE_S = 100.0
"""TTFT and TPOT bounds that nobody misses: everything is scheduled, and nothing refused."""

_START_S = 30.0
_TICK_S = 1 / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Case:
    """``requests`` come evenly over ``over_s`` (s), for ``tokens`` each; steps take ``step_ms``."""

    name: str
    requests: int
    over_s: float
    tokens: int
    step_ms: float

    def asked(self) -> list[WorkloadRequest]:
        """As a workload."""
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
    """Coefficients with which every step takes so long, whatever is in it."""
    return {"b": 0.0, "d": step_ms / 1e3, "alpha": 0.0}


def gateway_config(engine: dict[str, Any], port: int) -> dict[str, Any]:
    """What ``antares serve`` is told."""
    return {
        "server": {"port": port},
        "engines": [engine],
        "predictor": {"enabled": False, "expected_tokens": 256},
        "classes": {"loose": {"ttft_ms": LOOSE_S * 1e3, "tpot_ms": LOOSE_S * 1e3}},
        "default_class": "loose",
    }


@dataclass(slots=True)
class Server:
    """A process that serves at ``url``; ``measured`` is the one whose CPU time counts."""

    url: str
    measured: asyncio.subprocess.Process

    def cpu_s(self) -> float:
        """CPU seconds that it has taken so far."""
        stat = Path(f"/proc/{self.measured.pid}/stat").read_text(encoding="ascii").rpartition(") ")[2].split()
        return (int(stat[11]) + int(stat[12])) * _TICK_S


@contextlib.asynccontextmanager
async def server(name: str, case: Case, folder: Path) -> AsyncIterator[Server]:
    """One of `SERVERS`, up until the block ends."""
    async with contextlib.AsyncExitStack() as stack:
        simulated = {"kind": "simulated", "model": MODEL, "step_times": step_times(case.step_ms)}
        if name == "around":
            yield await _antares(stack, simulated, folder)
            return
        port = _free_port()
        command = [
            "-m",
            "benchmarks.overhead.gateway_cost",
            "--engine-alone",
            str(port),
            "--step-ms",
            str(case.step_ms),
        ]
        alone = Server(f"http://127.0.0.1:{port}", await _process(stack, command))
        await _until_up(alone, "/health")
        if name == "alone":
            yield alone
            return
        remote = {"kind": "http", "base_url": alone.url, "step_times": step_times(case.step_ms)}
        yield await _antares(stack, remote, folder)


async def _antares(stack: contextlib.AsyncExitStack, engine: dict[str, Any], folder: Path) -> Server:
    port = _free_port()
    config = folder / f"{engine['kind']}.yaml"
    config.write_text(yaml.safe_dump(gateway_config(engine, port)), encoding="utf-8")
    process = await _process(stack, ["-c", "from gateway.cli import main; main()", "serve", "--config", str(config)])
    serving = Server(f"http://127.0.0.1:{port}", process)
    await _until_up(serving, "/ready")
    return serving


async def _process(stack: contextlib.AsyncExitStack, arguments: list[str]) -> asyncio.subprocess.Process:
    quiet = asyncio.subprocess.DEVNULL
    process = await asyncio.create_subprocess_exec(sys.executable, *arguments, stdout=quiet, stderr=quiet)
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


async def _until_up(starting: Server, path: str) -> None:
    """Raises `RuntimeError` when it ends first, or takes too long."""
    until = time.monotonic() + _START_S
    async with aiohttp.ClientSession() as session:
        while time.monotonic() < until and starting.measured.returncode is None:
            with contextlib.suppress(aiohttp.ClientError):
                async with session.get(starting.url + path) as answer:
                    if answer.status == 200:
                        return
            await asyncio.sleep(0.05)
    raise RuntimeError(f"{starting.url} did not come up")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def measure(name: str, case: Case, round_: int) -> dict[str, Any]:
    """Serve ``case`` once. Raises `RuntimeError` when anything was not answered in full."""
    with tempfile.TemporaryDirectory(prefix="antares-cost-") as folder:
        async with server(name, case, Path(folder)) as serving:
            target = Target(serving.url, MODEL, endpoint="chat")
            few = Case("warm-up", 20, 0.2, 8, case.step_ms)
            await send_from_another_process(target, few.asked(), round_)
            before = serving.cpu_s()
            sent = await send_from_another_process(target, case.asked(), round_)
            cpu_s = serving.cpu_s() - before
    all_answered(name, case, sent.answers)
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


def all_answered(name: str, case: Case, answers: Sequence[ClientResult]) -> None:
    """Raises `RuntimeError` unless everybody has every token: half an answer costs half."""
    broken = [a.reason or f"{a.tokens} tokens" for a in answers if a.outcome != "finished" or a.tokens != case.tokens]
    if broken:
        raise RuntimeError(f"{case.name}, {name}: {len(broken)} not answered in full, the first: {broken[0]}")


def measured(rounds: int, cases: tuple[Case, ...]) -> Iterator[dict[str, Any]]:
    """Every case on every server, so many times; the servers take turns."""
    turns = [(name, case, at) for at in range(rounds) for case in cases for name in SERVERS]
    for turn in track(turns, "Serving", console=Console(stderr=True)):
        yield asyncio.run(measure(*turn))


def costs(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row a case and kind of gateway: what it adds to the engine alone, mean over the rounds and its deviation.

    CPU microseconds of a request in the case of one-token answers, else of a token; milliseconds of the median and the
    99th percentile of TTFT, and by how much the median TPOT grows (a ratio).
    """
    of = {(run["server"], run["case"], run["round"]): run for run in runs}
    rows = []
    for case in dict.fromkeys(run["case"] for run in runs):
        rounds = sorted({run["round"] for run in runs if run["case"] == case})
        cpu = "cpu_us_a_request" if case == ONE_TOKEN else "cpu_us_a_token"
        for name in SERVERS[1:]:
            pairs = [(of["alone", case, at], of[name, case, at]) for at in rounds]
            ours = [more[cpu] - (alone[cpu] if name == "around" else 0.0) for alone, more in pairs]
            row: dict[str, Any] = {"server": name, "case": case, "of": cpu.removeprefix("cpu_us_a_")}
            row["cpu_us"], row["cpu_us_sd"] = fmean(ours), stdev(ours) if len(ours) > 1 else 0.0
            row["alone_cpu_us"] = fmean(alone[cpu] for alone, _ in pairs)
            for key in ("ttft_p50_ms", "ttft_p99_ms"):
                row[key] = fmean(more[key] - alone[key] for alone, more in pairs)
            both = [(alone["tpot_p50_ms"], more["tpot_p50_ms"]) for alone, more in pairs]
            row["tpot_ratio"] = fmean(more / alone for alone, more in both) if all(a for a, _ in both) else None
            rows.append(row)
    return rows


_HEADS = ("case", "gateway", "CPU µs", "of engine alone", "TTFT p50 ms", "p99 ms", "TPOT")


def cells(row: dict[str, Any]) -> list[str]:
    """A row as words."""
    ratio = row["tpot_ratio"]
    return [
        row["case"],
        row["server"],
        f"{row['cpu_us']:,.0f} ({row['cpu_us_sd']:,.0f}) a {row['of']}",
        f"{row['alone_cpu_us']:,.0f}",
        f"{row['ttft_p50_ms']:+.1f}",
        f"{row['ttft_p99_ms']:+.1f}",
        "" if ratio is None else f"x {ratio:.3f}",
    ]


def page(found: dict[str, Any]) -> str:
    """The same in Markdown, with the command that makes it again."""
    lines = [
        "# What the gateway costs",
        "",
        "**CPU**, two shared cores for engine, gateway and load client together; a simulated engine, real HTTP; means "
        f"of {found['rounds']} rounds in which the servers took turns, standard deviations in brackets. *Around*: the "
        "engine in the gateway's process, as with `kind: vllm`; *in front*: before a server, as with `kind: http`. "
        "*CPU µs*: what the gateway adds; beside it what the engine alone takes, HTTP included. TTFT: what is added, "
        "in ms; TPOT: over that of the engine alone.",
        "",
        "```",
        "python -m benchmarks.overhead.gateway_cost --json > docs/results/gateway_cost.json",
        "python -m benchmarks.overhead.gateway_cost --page docs/results/gateway_cost.json",
        "```",
        "",
        "| " + " | ".join(_HEADS) + " |",
        "|---" * len(_HEADS) + "|",
    ]
    lines += ["| " + " | ".join(cells(row)) + " |" for row in costs(found["runs"])]
    return "\n".join(lines) + "\n"


async def engine_alone(port: int, step_ms: float) -> None:
    """Serve a simulated engine as a server of its own would, until it is told to end."""
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
    rounds: Annotated[int, typer.Option(min=1, help="Times that every case is served by every server.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
    page_of: Annotated[
        Path | None, typer.Option("--page", help="Write the page of this JSON beside it, and end.")
    ] = None,
    alone_at: Annotated[int | None, typer.Option("--engine-alone", hidden=True)] = None,
    step_ms: Annotated[float, typer.Option(hidden=True)] = 4.0,
) -> None:
    """Serve the same streams with and without the gateway, and say what it costs."""
    if alone_at is not None:
        asyncio.run(engine_alone(alone_at, step_ms))
        return
    if page_of is not None:
        page_of.with_suffix(".md").write_text(page(json.loads(page_of.read_text(encoding="utf-8"))), encoding="utf-8")
        return
    runs = list(measured(rounds, CASES))
    if as_json:
        json.dump({"rounds": rounds, "cases": [asdict(case) for case in CASES], "runs": runs}, sys.stdout, indent=2)
        sys.stdout.write("\n")
        return
    drawn = Table(title="What the gateway costs")
    for head in _HEADS:
        drawn.add_column(head)
    for row in costs(runs):
        drawn.add_row(*cells(row))
    Console(width=max(Console().width, 112)).print(drawn)


if __name__ == "__main__":
    typer.run(main)
