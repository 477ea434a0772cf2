"""Measures n-gram speculation on a real vLLM on CPU: accuracy of the step-time model, and adherence beside stock vLLM.

    python -m benchmarks.speculation.real_engine --json > docs/results/speculation_cpu.json
    python -m benchmarks.speculation.real_engine --page docs/results/speculation_cpu.json

1. Start vLLM with SmolLM2 and n-gram drafts, and measure its capacity under `fcfs`, which behaves as stock vLLM.
2. Send workloads at multiples of the capacity. `fcfs` and `slack` get the same requests, one after the other.
3. Fit the step-time model to every other stretch of the steps, and score it on the other ones. Do that once with
   drafts counted as tokens, as the gate counts them, and once without.
"""

from __future__ import annotations

import asyncio
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console

from benchmarks.command import AsJson, PageOf, Seeds, print_results, write_page
from benchmarks.live.real_engine import RealEngine
from benchmarks.markdown import policy_label, table, wrapped
from engine_adapter.build import BUILDERS
from engine_adapter.step_report import Acceptance, StepReport
from engine_adapter.step_time.linear_forms import fit_quality
from engine_adapter.step_time.model import StepTimeModel
from lab.bench.load_client import Target, send_from_another_process
from lab.records.run_record import run_record
from lab.workload import PAPER_SLOS, make_workload

MODEL = "smollm2-135m-instruct"
DRAFTS = 3
FLAGS = {
    "max-model-len": 2048,
    "max-num-seqs": 64,
    "max-num-batched-tokens": 512,
    "enforce-eager": True,
    "dtype": "float32",
    "speculative-config": {
        "method": "ngram",
        "num_speculative_tokens": DRAFTS,
        "prompt_lookup_max": 4,
        "prompt_lookup_min": 2,
    },
}
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "2", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
POLICIES = ("fcfs", "slack")
LOADS = (1.0, 2.0)
TIGHTEST_PACE = 0.8
"""Tightest pace of a workload, as a share of the median TPOT at saturation. The factor on the paper's bounds follows
from it, so that they are as hard to attain on a slow machine as on a fast one."""
PAPER_PACE_S = min(tpot_ms for _, tpot_ms in PAPER_SLOS["llama-3.1-8b"]) / 1000
"""The tightest pace of the paper's categories (s)."""
IN_FLIGHT = 32
"""Concurrent requests of the capacity measurement."""
STRETCH = 20
"""Consecutive steps that are fitted or held out together, because neighbouring steps are correlated."""
INTERRUPTED = 2
"""Steps that take this many times the median of steps of about their size (tokens, within half an octave) are left out:
other work on the machine causes them. As in `lab.profile.from_engine.drop_interrupted`."""

console = Console(stderr=True)


@dataclass(slots=True)
class StepLog(Acceptance):
    """Learns acceptance, and records every step that the engine reports."""

    steps: list[StepReport] = field(default_factory=list)

    def observe(self, step: StepReport) -> None:
        """Record and learn from ``step``."""
        self.steps.append(step)
        Acceptance.observe(self, step)


def with_drafts(step: StepReport) -> tuple[float, float, float]:
    """Return decode tokens, prefill tokens and mean context of ``step`` as the gate counts them."""
    tokens = step.decode_requests + step.draft_tokens
    return tokens, step.prefill_tokens, step.mean_context * step.decode_requests / max(tokens, 1)


def ignoring_drafts(step: StepReport) -> tuple[float, float, float]:
    """Return decode tokens, prefill tokens and mean context of ``step`` as if no decode had drafts."""
    return step.decode_requests, step.prefill_tokens, step.mean_context


MODELS: dict[str, Callable[[StepReport], tuple[float, float, float]]] = {
    "drafts ignored": ignoring_drafts,
    "drafts counted": with_drafts,
}


def uninterrupted(steps: Sequence[StepReport]) -> list[StepReport]:
    """Return ``steps`` without those that took `INTERRUPTED` times the median of steps with about as many tokens."""
    groups: dict[int, list[StepReport]] = defaultdict(list)
    for step in steps:
        groups[_octave(step)].append(step)
    usual_s = {key: median([step.elapsed_s for step in group]) for key, group in groups.items()}
    return [step for step in steps if step.elapsed_s < INTERRUPTED * usual_s[_octave(step)]]


def _octave(step: StepReport) -> int:
    return round(2 * math.log2(1 + step.decode_requests + step.draft_tokens + step.prefill_tokens))


def r2(steps: Sequence[StepReport], sizes: Callable[[StepReport], tuple[float, float, float]]) -> float:
    """Return R2 of the step-time model on held-out stretches of ``steps``, of which it sees ``sizes``."""
    kept = uninterrupted(steps)
    parts: tuple[list[StepReport], list[StepReport]] = [], []
    for number, step in enumerate(kept):
        parts[number // STRETCH % 2].append(step)
    model = StepTimeModel(window=len(kept), forms=False)
    for step in parts[0]:
        model.observe(*sizes(step), step.elapsed_s)
    model.refit()
    decodes, prefill, context = (np.asarray(column) for column in zip(*map(sizes, parts[1]), strict=True))
    predicted = model.curve.steps_s(decodes, decodes * context, prefill)
    return round(fit_quality(predicted, np.asarray([step.elapsed_s for step in parts[1]])).r2, 4)


async def measure(requests: int, seeds: int) -> dict[str, Any]:
    """Return the document: ``requests`` times the load of each run, and ``seeds`` workloads per load."""
    real = RealEngine(
        BUILDERS["vllm"](
            name="local", model=f"builtin:{MODEL}", served_model_name=MODEL, flags=FLAGS, env=ENVIRONMENT, gate="slack"
        )
    )
    console.print("Starting vLLM…")
    await real.start()
    runs: list[dict[str, Any]] = []
    try:
        state = real.engine.state
        capacity, tpot_s = await _saturated(real)
        slo_scale = round(TIGHTEST_PACE * tpot_s / PAPER_PACE_S, 1)
        console.print(f"Capacity {capacity:.2f} requests/s, the paper's bounds times {slo_scale:g}")
        for seed in range(seeds):
            for load in LOADS:
                # The arrivals of all loads take the same time.
                count = round(load * requests)
                workload = make_workload("small", qps=load * capacity, requests=count, seed=seed, slo_scale=slo_scale)
                for policy in POLICIES if seed % 2 == 0 else POLICIES[::-1]:
                    state.acceptance = log = StepLog()
                    async with real.gateway({"name": policy}, lengths_known=True) as (_, url):
                        target = Target(url, state.model, temperature=0.0)
                        sent = await send_from_another_process(target, workload, seed)
                    record = run_record(policy, load * capacity, seed, sent.results(), sent.duration_s, wall_s=0.0)
                    kept = {key: record[key] for key in ("slo_adherence", "goodput", "rejected", "tpot_p50_s")}
                    runs.append({"policy": policy, "load": load, "seed": seed} | kept | summary(log.steps))
                    console.print(runs[-1])
    finally:
        await real.engine.stop()
    return {
        "machine": "CPU", "model": MODEL, "drafts": DRAFTS, "capacity_rps": round(capacity, 3),
        "requests": requests, "seeds": list(range(seeds)), "slo_scale": slo_scale, "runs": runs,
    }  # fmt: skip


async def _saturated(real: RealEngine) -> tuple[float, float]:
    """Return requests per second and median TPOT (s) with `IN_FLIGHT` requests in flight, after a warm-up."""
    rate = tpot_s = 0.0
    for count in (IN_FLIGHT // 2, 2 * IN_FLIGHT):
        workload = make_workload("small", qps=1000.0, requests=count, seed=100, slo_scale=60.0)
        async with real.gateway({"name": "fcfs"}) as (_, url):
            target = Target(url, real.engine.state.model, max_connections=IN_FLIGHT, temperature=0.0)
            sent = await send_from_another_process(target, workload, 100)
        finished = sum(answer.outcome == "finished" for answer in sent.answers)
        if finished < count:
            raise RuntimeError(f"the engine finished only {finished} of {count} requests")
        rate = finished / sent.duration_s
        tpot_s = run_record("fcfs", rate, 100, sent.results(), sent.duration_s, wall_s=0.0)["tpot_p50_s"]
    return rate, tpot_s


def summary(steps: Sequence[StepReport]) -> dict[str, Any]:
    """Return the counts of ``steps``, and R2 of each of `MODELS`."""
    decodes, drafts = sum([s.decode_requests for s in steps]), sum([s.draft_tokens for s in steps])
    accepted = sum([s.accepted_tokens for s in steps])
    return {
        "steps": len(steps), "decodes": decodes, "drafts": drafts, "accepted": accepted,
        "r2": {name: r2(steps, sizes) for name, sizes in MODELS.items()},
    }  # fmt: skip


def page(found: dict[str, Any]) -> str:
    """Return the result page of the JSON."""
    head = f"""# N-gram speculation on a real vLLM

**CPU**: vLLM with {found["model"]} on two shared cores, {found["drafts"]} n-gram drafts per decode, temperature 0.
{found["requests"]} requests per run at 1x and twice as many at 2x, which arrive within
{found["requests"] / found["capacity_rps"]:.0f} s. Seeds {", ".join(map(str, found["seeds"]))}, the paper's bounds times
{found["slo_scale"]:g}, so the tightest pace is {1000 * PAPER_PACE_S * found["slo_scale"]:.0f} ms. The capacity is
{found["capacity_rps"]:.2f} requests/s, completed with {IN_FLIGHT} in flight under `fcfs`. Both policies use the
same engine and the same drafter, in turns, because other work shares the machine.
`fcfs` sends no pace, so the gate plans nothing.

The prompts are random tokens, and the answers repeat themselves, as those of small models do. So n-grams find many
drafts, and the acceptance says nothing about other models or texts. The model that ignores drafts is worst under
`slack`, whose gate drops a part of the drafts. Other work on the machine changes the speed of the engine between runs.

- *R2*: of the step-time model. It is fitted to every other stretch of {STRETCH} steps, and R2 is that of the
other stretches. Steps that take {INTERRUPTED} times the median of their size are left out.
- *Drafts ignored*: the model counts a decode as one token.
- *Drafts counted*: the model counts a decode and its drafts, as the step gate does.
- Each cell is the median over the seeds, and the range.

```
python -m benchmarks.speculation.real_engine --seeds {len(found["seeds"])} --json > docs/results/speculation_cpu.json
python -m benchmarks.speculation.real_engine --page docs/results/speculation_cpu.json
```"""
    rows = []
    for load in LOADS:
        for policy in POLICIES:
            runs = [run for run in found["runs"] if run["load"] == load and run["policy"] == policy]
            cells = [
                [run["slo_adherence"] for run in runs],
                [run["goodput"] for run in runs],
                [run["drafts"] / run["decodes"] for run in runs],
                [run["accepted"] / max(run["drafts"], 1) for run in runs],
                *([run["r2"][name] for run in runs] for name in MODELS),
            ]
            rows.append([f"{load:g}x", policy_label(policy), *map(_cell, cells)])
    heads = ["load", "policy", "adherence", "goodput", "drafts per decode", "accepted share"]
    heads += [f"R2, {name}" for name in MODELS]
    return wrapped(head) + "\n\n" + table(heads, rows) + "\n"


def _cell(values: list[float]) -> str:
    return f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def main(
    requests: Annotated[int, typer.Option(min=8, help="Requests per run at 1x.")] = 60,
    seeds: Seeds = 3,
    as_json: AsJson = False,
    page_of: PageOf = None,
) -> None:
    """Measure n-gram speculation on a real vLLM on CPU. Takes 8 to 15 minutes."""
    if page_of is not None:
        write_page(page_of, page)
        return
    print_results(asyncio.run(measure(requests, seeds)), as_json, page)


if __name__ == "__main__":
    typer.run(main)
