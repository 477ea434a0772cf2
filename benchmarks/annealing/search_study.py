"""Compares the annealing search with exhaustive search and with simple orders, and checks its time budget.

    python -m benchmarks.annealing.search_study --seed 1 --json docs/results/annealing_search.json

Instances are random: sizes of the code and chat tasks, the bilinear latency of the A100 profile, and bounds from
infeasible to easy. Batches hold at most 1 to 4 requests, or 8 for more than 8 requests. Times are CPU times
(``time.process_time``) of one process.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable
from statistics import fmean, quantiles
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks import results_json
from benchmarks.command import JsonTo
from engine_adapter.step_time.profile import load_profile
from gateway.policies.annealing.exact import best_plan
from gateway.policies.annealing.latency import Latency
from gateway.policies.annealing.plan import START_ORDERS, Job, Limits, Problem
from gateway.policies.annealing.policy import Annealing
from gateway.policies.annealing.search import anneal
from lab.workload import code_chat

SAME = 1e-9
"""Relative difference of G below which two plans count as equal; covers rounding."""


def random_problem(seed: int, requests: int, batch: int, latency: Latency) -> Problem:
    """A standing set of code and chat requests in batches of at most ``batch``, with bounds from infeasible to easy."""
    numbers = np.random.default_rng([seed, requests])
    code = numbers.random(requests) < 0.5
    prompts, outputs = code_chat.draw(numbers, code)
    uniform = random.Random(f"{seed} {requests}").uniform
    jobs = []
    for is_code, prompt, output in zip(code.tolist(), prompts.tolist(), outputs.tolist(), strict=True):
        prefill, decode = latency.lines(prompt, output, prompt)
        alone = sum(prefill) + sum(decode)
        total_s = alone * requests / batch  # approximate duration of the whole set
        waited = uniform(0.0, 0.5)
        if is_code:
            job = Job(prefill, decode, waited, e2e_left=uniform(0.3, 1.5) * total_s + 0.5 * alone)
        else:
            pace = uniform(0.012, 0.03)
            job = Job(prefill, decode, waited, ttft_left=uniform(0.05, 1.0) * total_s, decode_s=output * pace)
        jobs.append(job)
    return Problem(jobs, Limits(batch))


def against_all(instances: int, seed: int, latency: Latency, budget_ms: float) -> list[dict[str, Any]]:
    """G over the optimum on random instances of 2 to 8 requests, for the policy's search and its parts."""
    policy = Annealing(budget_ms=budget_ms)
    budget = int(policy.budget_ms * policy.units_per_ms)
    rng = random.Random(seed)
    cases = [(rng.randint(2, 8), rng.randint(1, 4)) for _ in range(instances)]

    def fresh(number: int) -> Problem:
        return random_problem(seed * 100_000 + number, *cases[number], latency)

    best = []
    for number in range(instances):
        found = best_plan(fresh(number), prune=False)
        best.append(found.objective if found else 0.0)
    methods: dict[str, Callable[[Problem], float]] = {
        "search (annealing, then branch and bound)": lambda problem: policy.search(problem).objective,
        "annealing alone, the same budget": lambda problem: anneal(problem, budget).objective,
        "annealing alone, 5 times the budget": lambda problem: anneal(problem, 5 * budget).objective,
        **{f"{name} order": _filled(name) for name in START_ORDERS},
    }
    rows = []
    for name, method in methods.items():
        ratios: list[float] = []
        spent: dict[int, list[float]] = {}
        for number in range(instances):
            problem = fresh(number)
            started = time.process_time()
            goal = method(problem)
            spent.setdefault(cases[number][0], []).append(time.process_time() - started)
            ratios.append(goal / best[number] if best[number] else 1.0)
        assert max(ratios) <= 1 + SAME, "a plan is better than the optimum"
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
    return lambda problem: problem.plan(problem.fill(START_ORDERS[name](problem.jobs))).objective


def budget_use(seed: int, latency: Latency, sizes: tuple[int, ...], instances: int) -> list[dict[str, Any]]:
    """Search times over sizes and budgets, and G over that of the best simple order."""
    rows = []
    for requests in sizes:
        for budget_ms in (1.0, 3.0, 5.0, 20.0):
            policy = Annealing(budget_ms=budget_ms)
            spent, gains = [], []
            for number in range(instances):
                problem = random_problem(seed * 100_000 + number, requests, 8 if requests > 8 else 4, latency)
                started = time.process_time()
                plan = policy.search(problem)
                spent.append((time.process_time() - started) * 1e3)
                other = random_problem(seed * 100_000 + number, requests, 8 if requests > 8 else 4, latency)
                best_start = max(_filled(name)(other) for name in START_ORDERS)
                gains.append(plan.objective / best_start if plan.objective else 1.0)
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
    """Units of work per millisecond on this machine, for the option of that name.

    Returns the lower quartile over instances of 16 to 64 requests.
    """
    rates = []
    for requests in (16, 32, 64):
        for number in range(5):
            problem = random_problem(seed + number, requests, 8, latency)
            started = time.process_time()
            anneal(problem, 40_000)
            rates.append(problem.work / (time.process_time() - started) / 1e3)
    return sorted(rates)[len(rates) // 4]


def main(
    instances: Annotated[int, typer.Option(help="Random instances of up to 8 requests.")] = 1000,
    seed: Annotated[int, typer.Option(help="Seed of the instances.")] = 1,
    json_path: JsonTo = None,
) -> None:
    """Run the study and print its results."""
    latency = Latency.of_profile(load_profile("a100-llama3.1-8b"))
    found = {
        "what": "annealing search against exhaustive search, CPU times",
        "command": f"python -m benchmarks.annealing.search_study --instances {instances} --seed {seed}",
        "latency": {"prefill": latency.prefill, "decode": latency.decode},
        "units_per_ms_here": round(units_per_ms(seed, latency)),
        "against_exhaustive": against_all(instances, seed, latency, Annealing().budget_ms),
        "budget": budget_use(seed, latency, (8, 16, 32, 64), 40),
    }
    if json_path is not None:
        results_json.write(found, json_path)
    sys.stdout.write(results_json.dumps(found))


if __name__ == "__main__":
    typer.run(main)
