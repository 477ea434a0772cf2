"""Compares policies on one real engine, below and above its saturation throughput: vLLM, a small random model, CPU.

    python -m benchmarks.live.compare_policies --policy fcfs --policy slack --load 1 --load 2 --repeats 3

One engine serves the whole comparison. In each round the policies take turns in front of it, at each load and with the
same seed. So a drift in machine speed affects all of them. The saturation throughput is measured first: the rate at
which the engine completes the same workload with 64 requests always in flight.
"""

from __future__ import annotations

import asyncio
import itertools
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks import results_json
from benchmarks.command import AsJson
from benchmarks.live.real_engine import DUMMY, RealEngine, dummy_engine
from engine_adapter.engine import Engine
from gateway.app import Gateway
from lab.bench.load_client import Target, send_from_another_process
from lab.records.run_record import run_record
from lab.simulate.experiment import parse_policy, policy_spec
from lab.workload import make_workload

console = Console(stderr=True)

_IN_FLIGHT = 64
"""Concurrent requests of the measurement of the saturation throughput."""


async def _saturation(real: RealEngine, seed: int, temperature: float) -> float:
    """Requests per second that the engine completes with 64 in flight and no SLOs.

    Counts from the end of the 64th request to the start of the last, so that ramp-up and drain stay out.
    """
    import aiohttp

    workload = make_workload("small", qps=1000.0, requests=_IN_FLIGHT * 5, seed=seed)
    clock = asyncio.get_running_loop().time
    ended: list[float] = []
    started = 0.0
    async with real.gateway({"name": "fcfs"}) as (_, url), aiohttp.ClientSession(url) as session:
        slots = asyncio.Semaphore(_IN_FLIGHT)

        async def one(prompt_tokens: int, output_tokens: int) -> None:
            nonlocal started
            sizes = {"prompt": [7] * prompt_tokens, "max_tokens": output_tokens, "ignore_eos": True}
            body = {"model": DUMMY, "temperature": temperature, **sizes}
            async with slots:
                started = clock()
                async with session.post("/v1/completions", json=body) as response:
                    await response.read()
            ended.append(clock())

        await asyncio.gather(*(one(a.prompt_tokens, a.output_tokens) for a in workload))
    begin = ended[_IN_FLIGHT - 1]
    return sum(begin < at <= started for at in ended) / (started - begin)


async def compare(
    policies: list[str],
    loads: list[float],
    duration_s: float,
    repeats: int,
    slo_scale: float,
    seed: int,
    temperature: float,
) -> dict[str, Any]:
    """All runs in the order of the measurement, with the settings that they share."""
    with tempfile.TemporaryDirectory() as folder:
        real = RealEngine(dummy_engine(Path(folder)))
        console.print("Starting vLLM…")
        await real.start()
        try:
            saturation = await _saturation(real, seed, temperature)
            console.print(
                f"Saturation throughput {saturation:.2f} requests/s; offering {', '.join(map(str, loads))} times that"
            )
            runs = []
            for repeat, load, policy in itertools.product(range(repeats), loads, policies):
                workload = make_workload(
                    "small", qps=load * saturation, duration_s=duration_s, seed=seed + repeat, slo_scale=slo_scale
                )
                gate_s = real.engine.state.gate.gate_seconds
                async with real.gateway(policy_spec(policy)) as (gateway, url):
                    sent = await send_from_another_process(
                        Target(url, DUMMY, temperature=temperature), workload, seed + repeat
                    )
                    scheduling = _scheduling_cost(gateway, real.engine, gate_s)
                record = run_record(
                    policy,
                    load * saturation,
                    seed + repeat,
                    sent.results(),
                    sent.duration_s,
                    wall_s=sent.duration_s,
                    load=load,
                    **sent.extras(),
                    **scheduling,
                )
                runs.append(record)
                console.print(
                    f"round {repeat + 1}, load {load:g}, {policy}: goodput {record['goodput']:.2f}/s, "
                    f"adherence {record['slo_adherence']:.3f}"
                )
        finally:
            await real.engine.stop()
    return {
        "real": "vLLM on CPU, 8-layer 512-wide Llama with random weights, in bfloat16",
        "capacity_rps": round(saturation, 3),
        "duration_s": duration_s,
        "slo_table": "llama-3.1-8b",
        "slo_scale": slo_scale,
        "temperature": temperature,
        "runs": runs,
    }


def _scheduling_cost(gateway: Gateway, engine: Engine, gate_before_s: float) -> dict[str, Any]:
    """Seconds in decisions (gateway process) and in step gates (engine process), and the learned step times."""
    engine_queue = gateway.engine_queues[0]
    gate_s = engine.state.gate.gate_seconds - gate_before_s
    return {
        "scheduling_s": round(engine_queue.deciding_s + gate_s, 4),
        "deciding_s": round(engine_queue.deciding_s, 4),
        "gate_s": round(gate_s, 4),
        "decisions": engine_queue.decisions,
        "step_base_s": round(engine.state.step_time.times.d, 5),
        "step_per_sequence_s": round(engine.state.step_time.times.b, 6),
        "prefill_per_token_s": round(engine.state.step_time.times.alpha, 6),
    }


def _table(result: dict[str, Any]) -> Table:
    table = Table(title=f"Load as a multiple of {result['capacity_rps']:.2f} requests/s; mean and range")
    for head in ("load", "policy", "goodput /s", "adherence", "rejected", "TTFT violations", "TPOT violations"):
        table.add_column(head, justify="left" if head == "policy" else "right")
    for load, policy in dict.fromkeys((run["load"], run["policy"]) for run in result["runs"]):
        runs = [run for run in result["runs"] if (run["load"], run["policy"]) == (load, policy)]

        def cell(key: str, runs: list[dict[str, Any]] = runs) -> str:
            values = [run[key] for run in runs]
            return f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"

        keys = ("goodput", "slo_adherence", "rejected", "ttft_violations", "tpot_violations")
        table.add_row(f"{load:g}", policy, *(cell(key) for key in keys))
    return table


def main(
    policy: Annotated[list[str] | None, typer.Option(help="NAME or NAME:OPTION=VALUE,...; repeat for several.")] = None,
    load: Annotated[list[float] | None, typer.Option(help="Multiple of saturation; repeat. [default: 2]")] = None,
    duration: Annotated[float, typer.Option(min=1, help="Seconds of arrivals per run.")] = 30.0,
    repeats: Annotated[int, typer.Option(help="Rounds; the policies take turns in each.")] = 3,
    slo_scale: Annotated[float, typer.Option(help="Multiplies the paper's SLO table.")] = 2.0,
    seed: Annotated[int, typer.Option(help="Seed of the first round.")] = 0,
    temperature: Annotated[float, typer.Option(min=0, help="Sampling temperature; 0 is greedy.")] = 1.0,
    as_json: AsJson = False,
) -> None:
    """Compare policies on a real engine."""
    policies = policy or ["fcfs", "scorpio"]
    try:
        for each in policies:
            parse_policy(each)
    except ValueError as wrong:
        raise typer.BadParameter(str(wrong), param_hint="--policy") from wrong
    result = asyncio.run(compare(policies, load or [2.0], duration, repeats, slo_scale, seed, temperature))
    if as_json:
        sys.stdout.write(results_json.dumps(result))
    else:
        Console().print(_table(result))


if __name__ == "__main__":
    typer.run(main)
