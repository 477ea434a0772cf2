"""Measures what isolation costs two ordinary tenants, one of which offers three quarters of the requests.

    python -m benchmarks.isolation.price --seed 0 --seed 1

Both offer the ShareGPT workload with the six SLO classes of the paper, in virtual time (`lab.simulate`). Each load is
run with and without shares, that is, with a policy that does and does not know that they are two tenants.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import product
from statistics import median
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.command import Jobs
from benchmarks.isolation.study import DURATION_S, PROFILE
from engine_adapter.step_time.profile import load_profile
from gateway.policies.registry import make_policy
from lab.simulate.predictions import predict
from lab.simulate.simulator import simulate
from lab.workload import make_workload

LOADS = (20.0, 25.0, 30.0, 40.0)
"""Requests per second of both tenants together. The engine serves about 25."""

LARGER = 0.75
"""The larger tenant's part of the requests."""


@dataclass(frozen=True, slots=True)
class Split:
    """Adherence of the larger and of the smaller tenant (0 to 1), and attained requests per second of both."""

    larger: float
    smaller: float
    attained: float


def split(load: float, seed: int, shares: bool) -> Split:
    """Return what the tenants attain at ``load`` requests/s. ``shares``: the policy knows that they are two."""
    merged = []
    for tenant, part, own_seed in (("larger", LARGER, seed), ("smaller", 1 - LARGER, seed + 1000)):
        work = make_workload("sharegpt", qps=load * part, duration_s=DURATION_S, seed=own_seed)
        merged += [(tenant, one, length) for one, length in zip(work, predict("shipped", work, own_seed), strict=True)]
    merged.sort(key=lambda item: item[1].at_s)
    tenants = [tenant for tenant, _, _ in merged]
    result = simulate(
        [one for _, one, _ in merged],
        [length for _, _, length in merged],
        load_profile(PROFILE),
        lambda: make_policy("slack"),
        tenants=tenants if shares else None,
        seed=seed,
    )
    attained = {"larger": 0, "smaller": 0}
    for one, tenant in zip(result.results, tenants, strict=True):
        attained[tenant] += one.attained
    rates = {tenant: count / tenants.count(tenant) for tenant, count in attained.items()}
    return Split(rates["larger"], rates["smaller"], sum(attained.values()) / DURATION_S)


def rows(loads: Sequence[float], seeds: Sequence[int], jobs: int = 2) -> list[list[str]]:
    """Return for each load, with and without shares, the medians over the seeds as text."""
    cases = list(product(loads, (True, False), seeds))
    with ProcessPoolExecutor(jobs) as pool:
        found = dict(zip(cases, pool.map(split, *zip(*[(load, seed, on) for load, on, seed in cases], strict=True)),
                         strict=True))  # fmt: skip
    table = []
    for load, shares in product(loads, (True, False)):
        runs = [found[load, shares, seed] for seed in seeds]
        table.append([
            f"{load:g}", "with" if shares else "without",
            *(f"{median(getattr(run, name) for run in runs):.3f}" for name in ("larger", "smaller")),
            f"{median(run.attained for run in runs):.1f}",
        ])  # fmt: skip
    return table


def main(
    seed: Annotated[list[int] | None, typer.Option(help="Seeds. [default: 0 to 4]")] = None,
    jobs: Jobs = 2,
) -> None:
    """Print the price of isolation, simulated."""
    table = Table("requests/s", "shares", "larger tenant", "smaller tenant", "attained requests/s")
    for row in rows(LOADS, seed or range(5), jobs):
        table.add_row(*row)
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
