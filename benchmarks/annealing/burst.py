"""Compares annealing with FCFS on a burst of mixed requests: vLLM on CPU with a small random model.

    python -m benchmarks.annealing.burst --batch 8 --repeats 3 --json docs/results/annealing_burst.json

64 requests arrive at once through a gateway on a real socket. Half are chat (TTFT and TPOT bounds), half are code (an
end-to-end bound). The policies take turns in front of one engine that runs ``--batch`` requests at a time, as in the
paper: if all requests run at once, no order is needed. The bounds scale with the duration of the whole burst under
FCFS, which is measured first, so that they are equally strict on any machine. Lengths are known (``max_tokens`` with
``ignore_eos``).
"""

from __future__ import annotations

import asyncio
import math
import sys
import tempfile
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks import results_json
from benchmarks.command import JsonTo
from benchmarks.live.real_engine import DUMMY, RealEngine, dummy_engine
from lab.bench.load_client import Target, send_from_another_process
from lab.records.run_record import RequestResult, run_record
from lab.workload import SMALL_OUTPUTS, SMALL_PROMPTS, WorkloadRequest

POLICIES = ("fcfs", "annealing")


def configured(name: str, batch: int) -> dict[str, Any]:
    """The policy section of the configuration. As in the paper, annealing plans the whole burst and rejects nothing."""
    if name == "fcfs":
        return {"name": name}
    return {"name": name, "options": {"reject": False, "horizon": 64, "max_batch": batch}}


def burst(requests: int, seed: int, whole_s: float) -> list[WorkloadRequest]:
    """A burst at time 0, chat and code in turn.

    ``whole_s`` (s) is the duration of the burst under FCFS. The TTFT bounds of chat are 0.1 to 0.6 of it, the
    end-to-end bounds of code 0.3 to 1.0.
    """
    random = np.random.default_rng(seed)
    prompts, outputs = SMALL_PROMPTS.draw(random, requests), SMALL_OUTPUTS.draw(random, requests)
    shares = random.uniform(0.0, 1.0, requests)
    workload = []
    for number, (prompt, output, share) in enumerate(
        zip(prompts.tolist(), outputs.tolist(), shares.tolist(), strict=True)
    ):
        if number % 2:
            workload.append(
                WorkloadRequest(0.0, prompt, output, math.inf, math.inf, 2, e2e_slo_s=(0.3 + 0.7 * share) * whole_s)
            )
        else:
            # 50 ms per token is about three times a step of this engine with a small batch.
            workload.append(WorkloadRequest(0.0, prompt, output, (0.1 + 0.5 * share) * whole_s, 0.05, 1))
    return workload


async def serve_once(
    real: RealEngine, policy: dict[str, Any], workload: list[WorkloadRequest], seed: int
) -> tuple[list[RequestResult], float]:
    """The results of a burst, and its duration (s)."""
    async with real.gateway(policy, lengths_known=True) as (_, url):
        sent = await send_from_another_process(Target(url, DUMMY), workload, seed)
    return sent.results(), sent.duration_s


async def compare(requests: int, batch: int, repeats: int, seed: int) -> dict[str, Any]:
    """All runs in the order of the measurement, with the settings that they share."""
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        real = RealEngine(dummy_engine(Path(folder), batch))
        await real.start()
        try:
            loose = burst(requests, seed, 600.0)
            # The first burst warms up the engine, and the gateway learns its step times.
            await serve_once(real, configured("fcfs", batch), loose, seed)
            _, whole_s = await serve_once(real, configured("fcfs", batch), loose, seed)
            for repeat in range(repeats):
                workload = burst(requests, seed + repeat, whole_s)
                for name in POLICIES:
                    served, duration_s = await serve_once(real, configured(name, batch), workload, seed + repeat)
                    record = run_record(name, 0.0, seed + repeat, served, duration_s, wall_s=duration_s)
                    record["mean_latency_s"] = round(
                        fmean([s.e2e_s for s in served if s.e2e_s is not None] or [0.0]), 3
                    )
                    runs.append(record)
                    sys.stderr.write(f"{name}: {record['slo_adherence']:.3f}, mean {record['mean_latency_s']} s\n")
        finally:
            await real.engine.stop()
    return {
        "what": "real: vLLM on CPU, 8-layer 512-wide Llama with random weights",
        "command": f"python -m benchmarks.annealing.burst --requests {requests} --batch {batch} --repeats {repeats} "
        f"--seed {seed}",
        "batch": batch,
        "burst_under_fcfs_s": round(whole_s, 3),
        "runs": runs,
    }


def main(
    requests: Annotated[int, typer.Option(help="Requests in the burst.")] = 64,
    batch: Annotated[int, typer.Option(help="Maximum number of sequences in the engine's batch.")] = 8,
    repeats: Annotated[int, typer.Option(help="Bursts; the policies take turns.")] = 3,
    seed: Annotated[int, typer.Option(help="Seed of the first burst.")] = 0,
    json_path: JsonTo = None,
) -> None:
    """Run the bursts and print attainment and mean latency."""
    found = asyncio.run(compare(requests, batch, repeats, seed))
    if json_path is not None:
        results_json.write(found, json_path)
    for name in POLICIES:
        own = [run for run in found["runs"] if run["policy"] == name]
        sys.stdout.write(
            f"{name}: attained {fmean(run['slo_adherence'] for run in own):.3f}, "
            f"mean latency {fmean(run['mean_latency_s'] for run in own):.2f} s\n"
        )


if __name__ == "__main__":
    typer.run(main)
