"""Measures the accuracy of the simulator: the same workloads on a real engine and in the simulator.

    python -m benchmarks.live.fidelity --json > docs/results/fidelity.json

1. Start the configuration's engine (vLLM on CPU with SmolLM2) and measure its saturation throughput.
2. Fit a profile to the steps that it reports while it serves a few workloads with seeds of their own. A sweep would
   not do: the gateway and the load client share two cores with the engine, which slows down its steps.
3. Send other workloads to the engine, and to the simulator under that profile, at several loads and with several
   policies. Both sides know the lengths (`max_tokens` with `ignore_eos`), and their policies use the profile's step
   times throughout.

The ratio of a run's step times to the profile's is the drift of the machine since the fit. The run is also simulated at
that speed. Simulations at a few percent faster and slower show how predictable the run is.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console

from benchmarks import results_json
from benchmarks.command import AsJson
from benchmarks.live.real_engine import RealEngine
from engine_adapter.step_time.profile import Profile, load_profile, save_profile
from gateway.policies.registry import make_policy
from lab.bench.load_client import Target, send_from_another_process
from lab.profile.from_engine import (
    HELD_OUT,
    Sample,
    StepRecorder,
    as_steps,
    build_engine,
    drop_interrupted,
    fit_profile,
)
from lab.records.run_record import run_record
from lab.simulate.predictions import predict
from lab.simulate.simulator import simulate
from lab.workload import WorkloadRequest, make_workload

KEYS = ("slo_adherence", "ttft_p50_s", "tpot_p50_s", "goodput", "rejected", "ttft_violations", "tpot_violations")
SPEEDS = (0.95, 0.98, 1.0, 1.02, 1.05)
"""Step-time multipliers of the simulations that show how sensitive a run is to the machine's speed."""
IN_FLIGHT = 32
"""Concurrent requests of the measurement of the saturation throughput."""
FIT_LOADS = (0.5, 1.0, 2.0)
FIT_REQUESTS = 80
STRETCH = 40
"""Consecutive steps that are held out together, because neighbouring steps are correlated."""

console = Console(stderr=True)


async def measure(
    config: str,
    known: Profile | None,
    save: Path | None,
    loads: list[float],
    policies: list[str],
    requests: int,
    slo_scale: float,
    seed: int,
) -> dict[str, Any]:
    """Every pair of runs, with the settings that they share. Writes the profile to ``save``.

    Args:
        config: configuration file; its first engine is used.
        known: the profile to use; None fits one.
        save: where to write the profile.
        loads: offered rates as multiples of the saturation throughput.
        policies: names of policies.
        requests: requests per run.
        slo_scale: multiplies the bounds of the paper's SLO table.
        seed: seed of the first load's workload.
    """
    engine, description = build_engine(config)
    real = RealEngine(engine)
    console.print("Starting vLLM…")
    await real.start()
    try:
        saturation = await _saturation(real, seed)
        console.print(f"Saturation throughput {saturation:.2f} requests/s")
        profile = known or await _fit_profile(real, description, saturation, slo_scale, seed)
        if save is not None:
            save_profile(profile, save)
        pairs = []
        for number, load in enumerate(loads):
            workload = make_workload(
                "small", qps=load * saturation, requests=requests, seed=seed + number, slo_scale=slo_scale
            )
            for policy in policies:
                pair = await _pair(real, profile, policy, load, load * saturation, workload, seed + number)
                console.print(_line(pair))
                pairs.append(pair)
    finally:
        await engine.stop()
    return {
        "real": description,
        "capacity_rps": round(saturation, 3),
        "slo_table": "llama-3.1-8b",
        "slo_scale": slo_scale,
        "seed": seed,
        "profile_quality": profile.quality,
        "pairs": pairs,
    }


async def _saturation(real: RealEngine, seed: int) -> float:
    """Requests per second that the engine completes with `IN_FLIGHT` in flight, under SLOs too loose to matter."""
    workload = make_workload("small", qps=1000.0, requests=3 * IN_FLIGHT, seed=seed, slo_scale=60.0)
    async with real.gateway({"name": "fcfs"}) as (_, url):
        target = Target(url, real.engine.state.model, max_connections=IN_FLIGHT)
        sent = await send_from_another_process(target, workload, seed)
    finished = sum(answer.outcome == "finished" for answer in sent.answers)
    if finished < len(workload):
        raise RuntimeError(f"the engine finished only {finished} of {len(workload)} requests")
    return finished / sent.duration_s


async def _fit_profile(real: RealEngine, description: str, saturation: float, slo_scale: float, seed: int) -> Profile:
    """A profile fitted to the steps that the engine reports while it serves. Holds out whole stretches of steps."""
    state = real.engine.state
    recorder = StepRecorder(state.step_time.times)
    state.step_time = recorder
    for number, load in enumerate(FIT_LOADS):
        console.print(f"Fitting step times at {load:g} times that…")
        workload = make_workload(
            "small", qps=load * saturation, requests=FIT_REQUESTS, seed=seed + 1000 + number, slo_scale=slo_scale
        )
        async with real.gateway({"name": "fcfs"}, lengths_known=True) as (_, url):
            await send_from_another_process(Target(url, state.model), workload, seed + 1000 + number)
    samples = drop_interrupted(recorder.samples)
    stretches = np.random.default_rng(seed).random(len(samples) // STRETCH + 1) < HELD_OUT
    held_out = [s for i, s in enumerate(samples) if stretches[i // STRETCH]]
    fitted = [s for i, s in enumerate(samples) if not stretches[i // STRETCH]]
    method = (
        f"{len(FIT_LOADS)} workloads of {FIT_REQUESTS} requests through the gateway, at "
        f"{', '.join(map(str, FIT_LOADS))} times the saturation throughput, seed {seed}; {len(fitted)} steps fitted, "
        f"{len(held_out)} held out in stretches "
        f"of {STRETCH}, {len(recorder.samples) - len(samples)} interrupted steps left out"
    )
    return fit_profile(state, "cpu-smollm2", description, method, as_steps(fitted), as_steps(held_out))


async def _pair(
    real: RealEngine, profile: Profile, policy: str, load: float, qps: float, workload: list[WorkloadRequest], seed: int
) -> dict[str, Any]:
    """One workload with one policy, on the engine and in the simulator."""
    state = real.engine.state
    state.step_time = recorder = StepRecorder(profile.step_times(), learn=False)
    gate_s = state.gate.gate_seconds
    async with real.gateway({"name": policy}, lengths_known=True) as (gateway, url):
        sent = await send_from_another_process(Target(url, state.model), workload, seed)
        deciding_s = gateway.engine_queues[0].deciding_s
    measured = run_record(
        policy,
        qps,
        seed,
        sent.results(),
        sent.duration_s,
        wall_s=sent.duration_s,
        scheduling_s=deciding_s + state.gate.gate_seconds - gate_s,
        **sent.extras(),
    )
    return compared(measured, workload, profile, policy, load, qps, seed, drift(profile, recorder.samples)) | {
        "steps": len(recorder.samples)
    }


def compared(
    measured: dict[str, Any],
    workload: list[WorkloadRequest],
    profile: Profile,
    policy: str,
    load: float,
    qps: float,
    seed: int,
    drifted: float | None,
) -> dict[str, Any]:
    """The record of a real run, and the simulator's records of the same workload."""

    def simulated(speed: float) -> dict[str, Any]:
        result = simulate(
            workload,
            predict("oracle", workload, seed),
            profile.at_speed(speed),
            lambda: make_policy(policy),
            times=profile.step_times(),
            learn=False,
        )
        record = run_record(policy, qps, seed, result.results, result.duration_s, wall_s=0.0)
        return {key: record[key] for key in KEYS} | {
            "adherence_off": round(record["slo_adherence"] - measured["slo_adherence"], 4),
            "ttft_p50_off": _relative(record["ttft_p50_s"], measured["ttft_p50_s"]),
            "tpot_p50_off": _relative(record["tpot_p50_s"], measured["tpot_p50_s"]),
        }

    nearby = [simulated(speed)["ttft_p50_s"] for speed in SPEEDS]
    return {
        "policy": policy,
        "load": load,
        "qps": round(qps, 3),
        "requests": len(workload),
        "real": {key: measured[key] for key in (*KEYS, "client_lateness_p99_s", "scheduling_s", "duration_s")},
        "simulated": simulated(1.0),
        "at_speed": simulated(drifted or 1.0),
        "drift": drifted,
        "ttft_p50_spread": round(max(nearby) / min(nearby) - 1, 4) if all(nearby) else None,
    }


def drift(profile: Profile, samples: list[Sample]) -> float | None:
    """Median ratio of measured step times to those of ``profile``; 1 if the machine has not changed."""
    ratios = [
        s.seconds / profile.step_seconds(round(s.decodes), s.decodes * s.mean_context, int(s.prefill_tokens), 0)
        for s in samples
        if s.decodes + s.prefill_tokens >= 1
    ]
    return round(median(ratios), 4) if ratios else None


def _relative(simulated: float | None, measured: float | None) -> float | None:
    return round(simulated / measured - 1, 4) if simulated and measured else None


def _line(pair: dict[str, Any]) -> str:
    real = pair["real"]
    deviations = [
        f"{label}: adherence {pair[key]['slo_adherence']:.3f}, TTFT p50 {pair[key]['ttft_p50_off']:+.1%}, "
        f"TPOT p50 {pair[key]['tpot_p50_off']:+.1%}"
        for label, key in (("simulated", "simulated"), (f"at measured speed ({pair['drift']})", "at_speed"))
    ]
    return (
        f"{pair['policy']} at {pair['load']:g}x ({pair['qps']:.2f}/s): adherence {real['slo_adherence']:.3f}, TTFT p50 "
        f"{real['ttft_p50_s']:.3f} s, TPOT p50 {real['tpot_p50_s']:.4f} s; {'; '.join(deviations)}"
    )


def main(
    config: Annotated[str, typer.Option(help="Configuration; its first engine is used.")] = "configs/quickstart.yaml",
    profile: Annotated[str | None, typer.Option(help="Use this profile instead of fitting one.")] = None,
    save: Annotated[Path | None, typer.Option(help="Write the profile to this file.")] = None,
    load: Annotated[
        list[float] | None, typer.Option(help="Multiple of the saturation throughput; repeat. [default: 0.5, 1, 1.5]")
    ] = None,
    policy: Annotated[list[str] | None, typer.Option(help="Repeat for several. [default: fcfs, scorpio]")] = None,
    requests: Annotated[int, typer.Option(min=1, help="Requests per run.")] = 200,
    slo_scale: Annotated[float, typer.Option(help="Multiplies the paper's SLO table.")] = 8.0,
    seed: Annotated[int, typer.Option(help="Seed of the first load's workload.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Run the same workloads on a real engine and in the simulator."""
    known = None if profile is None else load_profile(profile)
    loads, policies = load or [0.5, 1.0, 1.5], policy or ["fcfs", "scorpio"]
    result = asyncio.run(measure(config, known, save, loads, policies, requests, slo_scale, seed))
    if as_json:
        sys.stdout.write(results_json.dumps(result))


if __name__ == "__main__":
    typer.run(main)
