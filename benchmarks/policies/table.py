"""Every policy on every profile and workload, at multiples of what stock vLLM bears. Simulated.

    python -m benchmarks.policies.table --json > docs/results/policies.json
    python -m benchmarks.policies.table --page docs/results/policies.json

S is the highest rate at which stock vLLM (`fcfs`, chunked prefill) keeps 90% adherence on that profile and workload,
mean over the seeds, to 1%.
Lengths are predicted with the shipped model's measured errors. Runs with the same seed see the same requests.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

from lab.simulate.experiment import Experiment, capacity, perform_all, runs_of

KEEPS = 0.9
"""Adherence that defines S."""

LOADS = (0.5, 0.8, 1.0, 1.5, 2.0, 3.0)
POLICIES = ("fcfs", "s3", "mooncake", "scorpio", "slack")
AS_PUBLISHED = "scorpio, prefill first"
"""SCORPIO in the step mode that its authors ran."""

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
"""What each is simulated on, and its workload where that is not ShareGPT's lengths with Poisson arrivals.

The last is the first for longer: what is left of a short overload when arrivals end flatters everybody.
"""
OVERLOADS = {"a100-llama3.1-8b, 180 s": (2.0, 3.0)}
"""Settings that are simulated under overload only."""

KEYS = ("goodput", "slo_adherence", "rejected", "ttft_violations", "tpot_violations", "count_bound", "fair_bound",
        "preemptions", "scheduling_s")  # fmt: skip

console = Console(stderr=True)


def experiment(setting: str, duration_s: float) -> Experiment:
    """The experiment of a row of `SETTINGS`."""
    options = {"name": "sharegpt", "duration_s": duration_s, **SETTINGS[setting]}
    return Experiment(profile=options.pop("profile"), workload=options)


def measure(settings: list[str], seeds: list[int], duration_s: float, jobs: int) -> Iterator[dict[str, Any]]:
    """For each setting its S, and the records of all policies at all loads."""
    with Progress(console=console) as progress:
        task = progress.add_task("policies", total=sum(len(OVERLOADS.get(name, LOADS)) for name in settings))
        for setting in settings:
            chunked = experiment(setting, duration_s)
            published = replace(chunked, step_mode="prefill-first")
            stock, _ = capacity(chunked, "fcfs", seeds, KEEPS, precision=0.01, jobs=jobs)
            runs: list[dict[str, Any]] = []
            for load in OVERLOADS.get(setting, LOADS):
                for how, names, label in ((chunked, POLICIES, None), (published, ("scorpio",), AS_PUBLISHED)):
                    for record in perform_all(how, runs_of(names, [load * stock], seeds), jobs):
                        kept = {key: record.get(key) for key in KEYS}
                        worst = min(each["slo_adherence"] for each in record["per_class"].values())
                        policy = label or record["policy"]
                        runs.append(
                            {"policy": policy, "load": load, "seed": record["seed"], "worst_class": worst} | kept
                        )
                progress.advance(task)
            yield {"setting": setting, "stock_qps": round(stock, 2), "runs": runs}


def page(found: dict[str, Any]) -> str:
    """The tables in Markdown: goodput of each policy at each load, mean (and standard deviation) over the seeds."""
    seeds, duration = found["seeds"], found["duration_s"]
    settings = [part["setting"] for part in found["settings"]]
    chosen = "" if settings == list(SETTINGS) else "".join(f' --setting "{name}"' for name in settings)
    lines = [
        "# Policies, everywhere",
        "",
        f"**Simulated**, shipped predictor's errors, {duration:g} s of arrivals where nothing else is said, seeds "
        f"{', '.join(map(str, seeds))}: goodput in requests/s, drain included, mean (standard deviation). *S* is what "
        "stock vLLM (`fcfs`) bears with 90% adherence. *Ratio* is `slack` over the best of the others at that load. "
        "Adherence beside the count bound, which no policy can pass, and that of the SLO class that fares worst.",
        "",
        "```",
        f"python -m benchmarks.policies.table{chosen} --duration {duration:g} --seeds {len(seeds)} --json \\",
        "    > docs/results/policies.json",
        "python -m benchmarks.policies.table --page docs/results/policies.json",
        "```",
    ]
    ratios: list[float] = []
    for part in found["settings"]:
        policies = list(dict.fromkeys(run["policy"] for run in part["runs"]))
        lines += ["", f"## {part['setting']}: S = {part['stock_qps']:g}/s", ""]
        lines.append(
            "| load | "
            + " | ".join(f"`{p}`" for p in policies)
            + " | ratio | `slack`: adherence (count bound), worst class |"
        )
        lines.append("|---" * (len(policies) + 3) + "|")
        for load in _loads(part):
            goodput = {p: _of(part, p, load, "goodput") for p in policies}
            best = max(fmean(values) for p, values in goodput.items() if p != "slack")
            ratio = fmean(goodput["slack"]) / best if best else float("nan")
            if load >= 1.5:
                ratios.append(ratio)
            cells = [_cell(goodput[p]) for p in policies]
            adherence, bound, worst = (
                fmean(_of(part, "slack", load, key)) for key in ("slo_adherence", "count_bound", "worst_class")
            )
            lines.append(
                f"| {load:g} S | "
                + " | ".join(cells)
                + f" | {ratio:.2f} | {adherence:.3f} ({bound:.3f}), {worst:.2f} |"
            )
    lines += ["", f"Mean ratio at 1.5 S and beyond: **{fmean(ratios):.2f}**; the least: {min(ratios):.2f}.", ""]
    lines += _against(found["settings"])
    return "\n".join(lines)


def _against(parts: list[dict[str, Any]]) -> list[str]:
    """Goodput of `slack` over that of some others, under overload."""
    rivals = (AS_PUBLISHED, "scorpio", "fcfs")
    lines = ["## `slack` over the others, under overload", ""]
    lines.append("| setting | load | " + " | ".join(f"over `{r}`" for r in rivals) + " | adherence over the bound |")
    lines.append("|---" * (len(rivals) + 3) + "|")
    for part in parts:
        for load in (2.0, 3.0):
            mine = fmean(_of(part, "slack", load, "goodput"))
            theirs = [fmean(_of(part, rival, load, "goodput")) for rival in rivals]
            times = [f"{mine / other:.2f}" if other else "all" for other in theirs]
            adherence, bound = (fmean(_of(part, "slack", load, key)) for key in ("slo_adherence", "count_bound"))
            lines.append(f"| {part['setting']} | {load:g} S | {' | '.join(times)} | {adherence / bound:.3f} |")
    return [*lines, ""]


def draw(part: dict[str, Any], target: Path) -> None:
    """Goodput of each policy over the load, for one setting."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for policy in dict.fromkeys(run["policy"] for run in part["runs"]):
        goodput = [fmean(_of(part, policy, load, "goodput")) for load in _loads(part)]
        axes.plot([load * part["stock_qps"] for load in _loads(part)], goodput, marker="o", label=policy,
                  linewidth=3 if policy == "slack" else 1.2)  # fmt: skip
    axes.axvline(part["stock_qps"], color="grey", linestyle=":", linewidth=1)
    axes.set(xlabel="offered, requests/s (dotted: what stock vLLM bears)", ylabel="attained, requests/s",
             title=f"Simulated: {part['setting']}")  # fmt: skip
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(target, dpi=130)


def _loads(part: dict[str, Any]) -> list[float]:
    return sorted({run["load"] for run in part["runs"]})


def _of(part: dict[str, Any], policy: str, load: float, key: str) -> list[float]:
    return [run[key] for run in part["runs"] if run["policy"] == policy and run["load"] == load]


def _cell(values: list[float]) -> str:
    return f"{fmean(values):.1f}" + (f" ({stdev(values):.1f})" if len(values) > 1 else "")


def main(
    setting: Annotated[list[str] | None, typer.Option(help="A row; repeat for several. [default: all]")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="How many; they are 0, 1, ...")] = 5,
    duration: Annotated[float, typer.Option(min=1, help="Seconds of arrivals.")] = 60.0,
    jobs: Annotated[int, typer.Option(min=1, help="Processes.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
    page_of: Annotated[
        Path | None, typer.Option("--page", help="Write the page and picture of this JSON beside it, and end.")
    ] = None,
) -> None:
    """Simulate every policy on every profile and workload."""
    if page_of is not None:
        found = json.loads(page_of.read_text(encoding="utf-8"))
        page_of.with_suffix(".md").write_text(page(found), encoding="utf-8")
        draw(found["settings"][0], page_of.with_suffix(".png"))
        return
    unknown = sorted(set(setting or ()) - set(SETTINGS))
    if unknown:
        raise typer.BadParameter(f"no setting {unknown[0]!r}; there are {', '.join(SETTINGS)}", param_hint="--setting")
    numbers = list(range(seeds))
    parts = list(measure(setting or list(SETTINGS), numbers, duration, jobs))
    found = {"seeds": numbers, "duration_s": duration, "keeps": KEEPS, "settings": parts}
    if as_json:
        json.dump(found, sys.stdout, indent=1)
        sys.stdout.write("\n")
    else:
        Console().print(page(found))


if __name__ == "__main__":
    typer.run(main)
