"""Measures goodput and capacity of a policy in every setting, to compare two versions of the code. Simulated.

    python -m benchmarks.slack.regression --output new.json            # in each of the two checkouts
    python -m benchmarks.slack.regression --compare old.json new.json  # prints a Markdown table

Goodput is measured at 1, 1.5, 2 and 3 S, and capacity at 90% and 99% adherence. Both are means over the seeds, in the
settings of `benchmarks.policies.table` except the one of 180 s. S is the capacity of stock vLLM at 90% adherence, from
docs/results/policies.json. With the same seed, both versions get the same requests.
"""

from __future__ import annotations

import json
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import fmean, median
from typing import Annotated, Any

import typer

from benchmarks.command import Jobs, Seeds
from benchmarks.policies.table import SETTINGS, experiment
from lab.simulate.experiment import Run, capacity, perform

LOADS = (1.0, 1.5, 2.0, 3.0)
"""Offered rates as multiples of S."""

LEVELS = (0.9, 0.99)
"""Adherence at which capacities are searched."""

DURATION_S = 60.0
"""Seconds of arrivals, as in the policy table."""

STOCK = Path("docs/results/policies.json")
"""The file that has S of each setting, relative to the root of a checkout."""


def measure(setting: str, stock_qps: float, policy: str, seeds: list[int]) -> dict[str, float]:
    """Return the goodput at each load and the capacity at each level of adherence, all in requests/s.

    Args:
        setting: a key of `SETTINGS`.
        stock_qps: S of the setting, in requests/s.
        policy: see `lab.simulate.experiment.parse_policy`.
        seeds: one run at each load for each of them.
    """
    how = experiment(setting, DURATION_S)
    found = {
        f"{load:g} S": fmean(perform(how, Run(policy, load * stock_qps, seed))["goodput"] for seed in seeds)
        for load in LOADS
    }
    for level in LEVELS:
        found[f"capacity at {level:.0%}"] = capacity(how, policy, seeds, level, precision=0.01)[0]
    return found


def compare(before: dict[str, dict[str, float]], after: dict[str, dict[str, float]]) -> str:
    """Return a Markdown table of the ratios of ``after`` to ``before``, with their median and range below it.

    Both map a setting to the figures that `measure` returns for it. The ratio to a figure of 0 counts as 1.
    """
    columns = list(next(iter(before.values())))
    lines = [f"| setting | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    ratios = {s: [after[s][c] / before[s][c] if before[s][c] else 1.0 for c in columns] for s in before}
    lines += [f"| {setting} | {' | '.join(f'{r:.3f}' for r in row)} |" for setting, row in ratios.items()]
    every = [r for row in ratios.values() for r in row]
    return "\n".join([*lines, "", f"Median {median(every):.3f}, lowest {min(every):.3f}, highest {max(every):.3f}."])


def main(
    output: Annotated[Path | None, typer.Option(help="Write the measurements to this JSON file.")] = None,
    policy: Annotated[str, typer.Option(help="NAME or NAME:OPTION=VALUE,...")] = "slack",
    seeds: Seeds = 5,
    jobs: Jobs = 2,
    comparison: Annotated[
        tuple[Path, Path] | None, typer.Option("--compare", help="Compare two such files: before, after.")
    ] = None,
) -> None:
    """Measure this checkout, or compare the files of two earlier measurements."""
    if comparison is not None:
        typer.echo(compare(*(json.loads(path.read_text()) for path in comparison)))
        return
    stock: dict[str, Any] = {part["setting"]: part["stock_qps"] for part in json.loads(STOCK.read_text())["settings"]}
    settings = [name for name in SETTINGS if "180 s" not in name]
    with ProcessPoolExecutor(jobs) as pool:
        futures = {s: pool.submit(measure, s, stock[s], policy, list(range(seeds))) for s in settings}
        found = {}
        for setting, future in futures.items():
            found[setting] = future.result()
            typer.echo(f"{setting}: {found[setting]}", err=True)
    if output is not None:
        output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
