"""Policies side by side on one real engine: vLLM on CPU with a small random model, loaded past its capacity.

    python -m benchmarks.compare_policies --policy fcfs --policy scorpio --repeats 3

One engine for the whole run; the policies take turns in front of it, round by round, each round with a seed of its own
that all policies share, so that a machine that drifts drifts for all. The capacity is measured first: the rate at which
the engine completes the same workload when 64 requests are always in flight.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import statistics
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Any

import typer
import uvicorn
from rich.console import Console
from rich.table import Table

from benchmarks.dummy_model import write_dummy_model
from benchmarks.load_client import Target, send_from_another_process
from benchmarks.run_record import run_record
from benchmarks.workload import make_workload
from engine_adapter.build import BUILDERS
from engine_adapter.engine import Engine, EngineEvents
from gateway.app import Gateway
from gateway.config import GatewayConfig, parse

MODEL = "small"
console = Console(stderr=True)


def _engine(folder: Path) -> Engine:
    flags = {
        "load-format": "dummy",
        "max-model-len": 2048,
        "max-num-seqs": 256,
        "max-num-batched-tokens": 512,
        "enforce-eager": True,
        "dtype": "float32",
        "enable-prefix-caching": False,
    }
    env = {"VLLM_CPU_KVCACHE_SPACE": "2", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    model = str(write_dummy_model(folder))
    return BUILDERS["vllm"](name=MODEL, model=model, served_model_name=MODEL, flags=flags, env=env)


def _config(policy: str) -> GatewayConfig:
    return parse(
        {
            "engines": [{"kind": "vllm", "model": MODEL}],  # the engine is made once, not from here
            "predictor": {"enabled": False},
            "policy": {"name": policy},
            "classes": {"default": {"ttft_ms": 10_000, "tpot_ms": 1000, "max_waiting": 100_000}},
            "default_class": "default",
        }
    )


class _Relay:
    """The engine's events go to whichever gateway is in front of it now."""

    def __init__(self) -> None:
        self.gateway: Gateway | None = None

    def on_step(self) -> None:
        if self.gateway is not None:
            self.gateway.lanes[0].wake()


@contextlib.asynccontextmanager
async def _in_front(engine: Engine, policy: str, relay: _Relay) -> AsyncIterator[tuple[Gateway, str]]:
    gateway = Gateway(_config(policy), [engine])
    server = uvicorn.Server(uvicorn.Config(gateway, port=0, lifespan="off", log_level="warning"))
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    relay.gateway = gateway
    try:
        yield gateway, f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        relay.gateway = None
        server.should_exit = True
        await serving


async def _capacity(engine: Engine, relay: _Relay, seed: int) -> float:
    """Requests per second that the engine completes with 64 always in flight (no SLO in the way)."""
    import aiohttp

    workload = make_workload("small", qps=1000.0, requests=160, seed=seed)
    async with _in_front(engine, "fcfs", relay) as (_, url), aiohttp.ClientSession(url) as session:
        places = asyncio.Semaphore(64)

        async def one(prompt_tokens: int, output_tokens: int) -> None:
            body = {"model": MODEL, "prompt": [7] * prompt_tokens, "max_tokens": output_tokens, "ignore_eos": True}
            async with places, session.post("/v1/completions", json=body) as response:
                await response.read()

        started = asyncio.get_running_loop().time()
        await asyncio.gather(*(one(a.prompt_tokens, a.output_tokens) for a in workload))
        return len(workload) / (asyncio.get_running_loop().time() - started)


async def compare(
    policies: list[str], overload: float, requests: int, repeats: int, slo_scale: float, seed: int
) -> dict[str, Any]:
    """All runs, in the order they were made, and what they were made with."""
    with tempfile.TemporaryDirectory() as folder:
        relay = _Relay()
        engine = _engine(Path(folder))
        console.print("Starting vLLM…")
        await engine.start(EngineEvents(on_step=relay.on_step))
        try:
            capacity = await _capacity(engine, relay, seed)
            console.print(f"Capacity {capacity:.2f} requests/s; offering {overload:g} times that")
            runs = []
            for repeat in range(repeats):
                for policy in policies:
                    workload = make_workload(
                        "small",
                        qps=overload * capacity,
                        requests=requests,
                        seed=seed + repeat,
                        slo_scale=slo_scale,
                    )
                    async with _in_front(engine, policy, relay) as (gateway, url):
                        sent = await send_from_another_process(Target(url, MODEL), workload, seed + repeat)
                        spent = _spent(gateway, engine)
                    figures = run_record(
                        policy,
                        overload * capacity,
                        seed + repeat,
                        sent.served(),
                        sent.duration_s,
                        wall_s=sent.duration_s,
                        **sent.extras(),
                        **spent,
                    )
                    runs.append(figures)
                    console.print(
                        f"round {repeat + 1} {policy}: goodput {figures['goodput']:.2f}/s, "
                        f"adherence {figures['slo_adherence']:.3f}"
                    )
        finally:
            await engine.stop()
    return {
        "real": "vLLM on CPU, 8-layer 512-wide Llama with random weights",
        "capacity_rps": round(capacity, 3),
        "overload": overload,
        "slo_table": "llama-3.1-8b",
        "slo_scale": slo_scale,
        "runs": runs,
    }


def _spent(gateway: Gateway, engine: Engine) -> dict[str, Any]:
    lane = gateway.lanes[0]
    return {
        "scheduling_s": round(lane.deciding_s, 4),
        "decisions": lane.decisions,
        "step_base_s": round(engine.state.step_time.times.d, 5),
        "step_per_sequence_s": round(engine.state.step_time.times.b, 6),
        "prefill_per_token_s": round(engine.state.step_time.times.alpha, 6),
    }


def _table(result: dict[str, Any]) -> Table:
    table = Table(title=f"{result['overload']:g} x capacity ({result['capacity_rps']:.2f} requests/s), mean and range")
    for head in ("policy", "goodput /s", "adherence", "rejected", "late TTFT", "late TPOT"):
        table.add_column(head, justify="left" if head == "policy" else "right")
    for policy in dict.fromkeys(run["policy"] for run in result["runs"]):
        runs = [run for run in result["runs"] if run["policy"] == policy]

        def cell(key: str, runs: list[dict[str, Any]] = runs) -> str:
            values = [run[key] for run in runs]
            return f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"

        keys = ("goodput", "slo_adherence", "rejected", "ttft_violations", "tpot_violations")
        table.add_row(policy, *(cell(key) for key in keys))
    return table


def main(
    policy: Annotated[list[str] | None, typer.Option(help="A policy; repeat for several.")] = None,
    overload: Annotated[float, typer.Option(help="Offered load as a multiple of the measured capacity.")] = 2.0,
    requests: Annotated[int, typer.Option(help="Requests per run.")] = 400,
    repeats: Annotated[int, typer.Option(help="Rounds; the policies take turns within each.")] = 3,
    slo_scale: Annotated[float, typer.Option(help="Multiplies the paper's SLO table.")] = 2.0,
    seed: Annotated[int, typer.Option(help="Seed of the first round.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Compare policies on a real engine."""
    result = asyncio.run(compare(policy or ["fcfs", "scorpio"], overload, requests, repeats, slo_scale, seed))
    if as_json:
        json.dump(result, sys.stdout, indent=2)
    else:
        Console().print(_table(result))


if __name__ == "__main__":
    typer.run(main)
