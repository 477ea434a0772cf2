"""A burst of mixed requests on a real engine: annealing against FCFS, on vLLM on CPU with a small random model.

    python -m benchmarks.annealing.burst --batch 8 --repeats 3 --json docs/results/annealing_burst.json

64 requests at once, half of them chat (TTFT and TPOT bounds), half code (an end-to-end bound), through a gateway on a
real socket; the policies take turns in front of one engine that runs ``--batch`` at a time, as the paper's do: where
all run at once there is nothing to order. Bounds scale with what the engine takes for the whole burst under FCFS, which
is measured first, so that they mean the same on any machine. Lengths are known (``max_tokens`` with ``ignore_eos``).
"""

from __future__ import annotations

import asyncio
import json
import math
import sys
import tempfile
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks.live.real_engine import DUMMY, RealEngine, dummy_engine
from lab.bench.load_client import Target, send_from_another_process
from lab.records.run_record import RequestResult, run_record
from lab.workload import SMALL_OUTPUTS, SMALL_PROMPTS, WorkloadRequest

POLICIES = ("fcfs", "annealing")


def configured(name: str, batch: int) -> dict[str, Any]:
    """The policy's part of a configuration: annealing plans all of the burst, and refuses nothing, as the paper's."""
    if name == "fcfs":
        return {"name": name}
    return {"name": name, "options": {"reject": False, "horizon": 64, "max_batch": batch}}


def burst(requests: int, seed: int, whole_s: float) -> list[WorkloadRequest]:
    """All at time 0. Chat: first token within 0.1 to 0.6 of ``whole_s``; code: done within 0.3 to 1.0 of it."""
    random = np.random.default_rng(seed)
    prompts, outputs = SMALL_PROMPTS.draw(random, requests), SMALL_OUTPUTS.draw(random, requests)
    shares = random.uniform(0.0, 1.0, requests)
    asked = []
    for which, (prompt, output, share) in enumerate(
        zip(prompts.tolist(), outputs.tolist(), shares.tolist(), strict=True)
    ):
        if which % 2:
            asked.append(
                WorkloadRequest(0.0, prompt, output, math.inf, math.inf, 2, e2e_slo_s=(0.3 + 0.7 * share) * whole_s)
            )
        else:
            # 50 ms a token: about three times a step of this engine with a small batch.
            asked.append(WorkloadRequest(0.0, prompt, output, (0.1 + 0.5 * share) * whole_s, 0.05, 1))
    return asked


async def one(
    real: RealEngine, policy: dict[str, Any], asked: list[WorkloadRequest], seed: int
) -> tuple[list[RequestResult], float]:
    """The fate of a burst, and how long it took (s)."""
    async with real.behind(policy, lengths_known=True) as (_, url):
        sent = await send_from_another_process(Target(url, DUMMY), asked, seed)
    return sent.results(), sent.duration_s


async def compare(requests: int, batch: int, repeats: int, seed: int) -> dict[str, Any]:
    """All runs, in the order they were made."""
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        real = RealEngine(dummy_engine(Path(folder), batch))
        await real.start()
        try:
            await one(
                real, configured("fcfs", batch), burst(requests, seed, 600.0), seed
            )  # warm up; step times are learnt
            _, whole_s = await one(real, configured("fcfs", batch), burst(requests, seed, 600.0), seed)
            for repeat in range(repeats):
                asked = burst(requests, seed + repeat, whole_s)
                for name in POLICIES:
                    served, duration_s = await one(real, configured(name, batch), asked, seed + repeat)
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
    requests: Annotated[int, typer.Option(help="In the burst.")] = 64,
    batch: Annotated[int, typer.Option(help="Sequences that the engine runs at a time.")] = 8,
    repeats: Annotated[int, typer.Option(help="Bursts; the policies take turns.")] = 3,
    seed: Annotated[int, typer.Option(help="Of the first burst.")] = 0,
    json_path: Annotated[Path | None, typer.Option("--json", help="Where to write the figures.")] = None,
) -> None:
    """Run the bursts and print attainment and mean latency."""
    found = asyncio.run(compare(requests, batch, repeats, seed))
    if json_path is not None:
        json_path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for name in POLICIES:
        mine = [run for run in found["runs"] if run["policy"] == name]
        sys.stdout.write(
            f"{name}: attained {fmean(run['slo_adherence'] for run in mine):.3f}, "
            f"mean latency {fmean(run['mean_latency_s'] for run in mine):.2f} s\n"
        )


if __name__ == "__main__":
    typer.run(main)
