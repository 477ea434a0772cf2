"""Compares the policies on every profile and workload, at multiples of stock vLLM's capacity. Simulated.

    python -m benchmarks.policies.table --json > docs/results/policies.json
    python -m benchmarks.policies.table --page docs/results/policies.json

S is the capacity of stock vLLM (`fcfs`, chunked prefill) on the profile and workload. It is the highest rate at which
the mean adherence over the seeds is 90%, to 1%. Length predictions have the measured errors of the shipped model.
Runs with the same seed get the same requests.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

from benchmarks.command import AsJson, Duration, Jobs, PageOf, Seeds, chosen, print_results, write_page
from benchmarks.policies.page import page
from lab.simulate.experiment import Experiment, capacity, perform_all, runs_of

KEEPS = 0.9
"""Adherence that defines S; the convention of docs/planning.md."""

LOADS = (0.5, 0.8, 1.0, 1.5, 2.0, 3.0)
"""Offered rates as multiples of S."""
POLICIES = ("fcfs", "s3", "mooncake", "scorpio", "slack")
AS_PUBLISHED = "scorpio, prefill first"
"""SCORPIO in the step mode of its authors."""

SETTINGS: dict[str, dict[str, Any]] = {
    "a100-llama3.1-8b": {"profile": "a100-llama3.1-8b"},
    "h200-llama3.1-8b": {"profile": "h200-llama3.1-8b"},
    "niyama-a100": {"profile": "niyama-a100"},
    "blis-a100": {"profile": "blis-a100"},
    "a100x4-gemma2-27b": {"profile": "a100x4-gemma2-27b", "slo_table": "gemma-2-27b"},
    "a100, azure-conv": {"profile": "a100-llama3.1-8b", "name": "azure-conv"},
    "a100, azure-code": {"profile": "a100-llama3.1-8b", "name": "azure-code"},
    "a100, bursts": {"profile": "a100-llama3.1-8b", "arrivals": "gamma", "burstiness": 3.0},
    "a100-llama3.1-8b, 180 s": {"profile": "a100-llama3.1-8b", "duration_s": 180.0},
}
"""Profile of each setting, and its workload where that differs from ShareGPT lengths with Poisson arrivals.

The last setting is the first one for longer: after a short overload every policy gains from the time in which the
remaining requests drain.
"""
LOADS_OF = {"a100-llama3.1-8b, 180 s": (2.0, 3.0)}
"""Loads of the settings that do not use `LOADS`."""

FIELDS = ("goodput", "slo_adherence", "rejected", "ttft_violations", "tpot_violations", "count_bound", "fair_bound",
          "preemptions", "scheduling_s")  # fmt: skip
"""Fields of a run record that the results keep."""

console = Console(stderr=True)


def experiment(setting: str, duration_s: float) -> Experiment:
    """The experiment of a setting of `SETTINGS`; ``duration_s`` applies unless the setting has its own."""
    options = {"name": "sharegpt", "duration_s": duration_s, **SETTINGS[setting]}
    return Experiment(profile=options.pop("profile"), workload=options)


def measure(settings: list[str], seeds: list[int], duration_s: float, jobs: int) -> Iterator[dict[str, Any]]:
    """For each setting: its S (``stock_qps``, 1/s), and the records of all policies at all loads."""
    with Progress(console=console) as progress:
        task = progress.add_task("policies", total=sum(len(LOADS_OF.get(name, LOADS)) for name in settings))
        for setting in settings:
            chunked = experiment(setting, duration_s)
            published = replace(chunked, step_mode="prefill-first")
            stock, _ = capacity(chunked, "fcfs", seeds, KEEPS, precision=0.01, jobs=jobs)
            runs: list[dict[str, Any]] = []
            for load in LOADS_OF.get(setting, LOADS):
                for mode, names, label in ((chunked, POLICIES, None), (published, ("scorpio",), AS_PUBLISHED)):
                    for record in perform_all(mode, runs_of(names, [load * stock], seeds), jobs):
                        fields = {key: record.get(key) for key in FIELDS}
                        worst = min(each["slo_adherence"] for each in record["per_class"].values())
                        policy = label or record["policy"]
                        runs.append(
                            {"policy": policy, "load": load, "seed": record["seed"], "worst_class": worst} | fields
                        )
                progress.advance(task)
            yield {"setting": setting, "stock_qps": round(stock, 2), "runs": runs}


def draw(part: dict[str, Any], target: Path) -> None:
    """Draw the goodput of each policy over the offered rate, for one setting."""
    from matplotlib.figure import Figure

    from benchmarks.policies.page import loads_of, mean

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for policy in dict.fromkeys(run["policy"] for run in part["runs"]):
        goodput = [mean(part, policy, load, "goodput") for load in loads_of(part)]
        axes.plot([load * part["stock_qps"] for load in loads_of(part)], goodput, marker="o", label=policy,
                  linewidth=3 if policy == "slack" else 1.2)  # fmt: skip
    axes.axvline(part["stock_qps"], color="grey", linestyle=":", linewidth=1)
    axes.set(xlabel="offered requests/s (dotted: capacity of stock vLLM)", ylabel="attained requests/s",
             title=f"Simulated: {part['setting']}")  # fmt: skip
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(target, dpi=130)


def main(
    setting: Annotated[
        list[str] | None, typer.Option(help="Run this setting; repeat for several. [default: all]")
    ] = None,
    seeds: Seeds = 5,
    duration: Duration = 60.0,
    jobs: Jobs = 1,
    as_json: AsJson = False,
    page_of: PageOf = None,
) -> None:
    """Simulate every policy on every profile and workload."""
    write = partial(page, all_settings=list(SETTINGS))
    if page_of is not None:
        draw(write_page(page_of, write)["settings"][0], page_of.with_suffix(".png"))
        return
    numbers = list(range(seeds))
    parts = list(measure(chosen("--setting", setting, SETTINGS), numbers, duration, jobs))
    found = {"seeds": numbers, "duration_s": duration, "keeps": KEEPS, "settings": parts}
    print_results(found, as_json, write)


if __name__ == "__main__":
    typer.run(main)
