"""The annealing search against every plan there is, against its strawmen, and against its budget.

    python -m benchmarks.annealing.search_study --seed 1 --json docs/results/annealing_search.json

Instances are random: sizes of the code and chat tasks, on the A100 profile's bilinear latency, in batches of at most 1
to 4 (8 for 64 requests), bounds drawn from hopeless to easy. CPU times (``time.process_time``), one process.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, quantiles
from typing import Annotated, Any

import numpy as np
import typer

from engine_adapter.step_time.profile import load_profile
from gateway.policies.annealing.exact import best_plan
from gateway.policies.annealing.latency import Latency
from gateway.policies.annealing.plan import START_ORDERS, Job, Limits, Problem
from gateway.policies.annealing.policy import Annealing
from gateway.policies.annealing.search import anneal
from lab.workload import code_chat

SAME = 1e-9
"""Relative difference of G up to which two plans are equally good."""


def random_board(seed: int, requests: int, batch: int, latency: Latency) -> Problem:
    """A standing set of code and chat requests, in batches of at most ``batch``; bounds from hopeless to easy."""
    numbers = np.random.default_rng([seed, requests])
    code = numbers.random(requests) < 0.5
    prompts, outputs = code_chat.draw(numbers, code)
    uniform = random.Random(f"{seed} {requests}").uniform
    jobs = []
    for is_code, prompt, output in zip(code.tolist(), prompts.tolist(), outputs.tolist(), strict=True):
        prefill, decode = latency.lines(prompt, output)
        alone = sum(prefill) + sum(decode)
        rounds = alone * requests / batch  # how long all of them take, more or less
        waited = uniform(0.0, 0.5)
        if is_code:
            job = Job(prefill, decode, waited, e2e_left=uniform(0.3, 1.5) * rounds + 0.5 * alone)
        else:
            pace = uniform(0.012, 0.03)
            job = Job(prefill, decode, waited, ttft_left=uniform(0.05, 1.0) * rounds, decode_s=output * pace)
        jobs.append(job)
    return Problem(jobs, Limits(batch))


def against_all(instances: int, seed: int, latency: Latency, budget_ms: float) -> list[dict[str, Any]]:
    """Random instances of 2 to 8 requests: G over the best there is, for the policy's search and its parts."""
    policy = Annealing(budget_ms=budget_ms)
    budget = int(policy.budget_ms * policy.units_per_ms)
    rng = random.Random(seed)
    cases = [(rng.randint(2, 8), rng.randint(1, 4)) for _ in range(instances)]

    def fresh(which: int) -> Problem:
        return random_board(seed * 100_000 + which, *cases[which], latency)

    best = []
    for which in range(instances):
        found = best_plan(fresh(which), prune=False)
        best.append(found.objective if found else 0.0)
    ways: dict[str, Callable[[Problem], float]] = {
        "search (annealing, then branch and bound)": lambda board: policy.search(board).objective,
        "annealing alone, the same budget": lambda board: anneal(board, budget).objective,
        "annealing alone, 5 times the budget": lambda board: anneal(board, 5 * budget).objective,
        **{f"{name} order": _filled(name) for name in START_ORDERS},
    }
    rows = []
    for name, way in ways.items():
        ratios: list[float] = []
        spent: dict[int, list[float]] = {}
        for which in range(instances):
            board = fresh(which)
            began = time.process_time()
            goal = way(board)
            spent.setdefault(cases[which][0], []).append(time.process_time() - began)
            ratios.append(goal / best[which] if best[which] else 1.0)
        assert max(ratios) <= 1 + SAME, "better than the best there is"
        rows.append(
            {
                "how": name,
                "same_g": round(sum(ratio >= 1 - SAME for ratio in ratios) / instances, 4),
                "mean_ratio": round(fmean(ratios), 4),
                "least_ratio": round(min(ratios), 4),
                "mean_ms": round(fmean([s for times in spent.values() for s in times]) * 1e3, 3),
                "mean_ms_8": round(fmean(spent[8]) * 1e3, 3) if 8 in spent else None,
            }
        )
    return rows


def _filled(name: str) -> Callable[[Problem], float]:
    return lambda board: board.plan(board.fill(START_ORDERS[name](board.jobs))).objective


def budget_kept(seed: int, latency: Latency, sizes: tuple[int, ...], instances: int) -> list[dict[str, Any]]:
    """Search times over sizes and budgets, and what was gained over the best strawman."""
    rows = []
    for requests in sizes:
        for budget_ms in (1.0, 3.0, 5.0, 20.0):
            policy = Annealing(budget_ms=budget_ms)
            spent, gains = [], []
            for which in range(instances):
                board = random_board(seed * 100_000 + which, requests, 8 if requests > 8 else 4, latency)
                began = time.process_time()
                plan = policy.search(board)
                spent.append((time.process_time() - began) * 1e3)
                other = random_board(seed * 100_000 + which, requests, 8 if requests > 8 else 4, latency)
                gains.append(
                    plan.objective / max(_filled(name)(other) for name in START_ORDERS) if plan.objective else 1.0
                )
            rows.append(
                {
                    "requests": requests,
                    "budget_ms": budget_ms,
                    "mean_ms": round(fmean(spent), 3),
                    "p90_ms": round(quantiles(spent, n=10)[-1], 3),
                    "within_120_percent": round(sum(ms <= 1.2 * budget_ms for ms in spent) / instances, 3),
                    "g_over_best_strawman": round(fmean(gains), 4),
                }
            )
    return rows


def units_per_ms(seed: int, latency: Latency) -> float:
    """Units of work a millisecond of this machine: the option of that name. The slowest of sizes 16 to 64."""
    rates = []
    for requests in (16, 32, 64):
        for which in range(5):
            board = random_board(seed + which, requests, 8, latency)
            began = time.process_time()
            anneal(board, 40_000)
            rates.append(board.work / (time.process_time() - began) / 1e3)
    return sorted(rates)[len(rates) // 4]


def main(
    instances: Annotated[int, typer.Option(help="Random instances of up to 8 requests.")] = 1000,
    seed: Annotated[int, typer.Option()] = 1,
    json_path: Annotated[Path | None, typer.Option("--json", help="Where to write the figures.")] = None,
) -> None:
    """Run the study and print it."""
    latency = Latency.of_profile(load_profile("a100-llama3.1-8b"))
    found = {
        "what": "annealing search against exhaustive search, CPU times",
        "command": f"python -m benchmarks.annealing.search_study --instances {instances} --seed {seed}",
        "latency": {"prefill": latency.prefill, "decode": latency.decode},
        "units_per_ms_here": round(units_per_ms(seed, latency)),
        "against_exhaustive": against_all(instances, seed, latency, Annealing().budget_ms),
        "budget": budget_kept(seed, latency, (8, 16, 32, 64), 40),
    }
    text = json.dumps(found, indent=1)
    if json_path is not None:
        json_path.write_text(text + "\n", encoding="utf-8")
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    typer.run(main)
