"""Capacity: the highest rate at which an engine meets the SLOs (`antares simulate --hold`), for docs/planning.md."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.figures.drawing import canvas, look, plot_label
from benchmarks.figures.figure import Document, Figure, new_document
from benchmarks.figures.lab import Lab
from benchmarks.figures.records import Record, factor_text, matching
from benchmarks.markdown import policy_label, table
from lab.simulate.experiment import Experiment
from lab.simulate.experiment import capacity as highest_rate

NAME = "capacity"
POLICIES = ("fcfs", "scorpio", "slack")
PROFILES = {
    "a100-llama3.1-8b": "llama-3.1-8b",
    "h200-llama3.1-8b": "llama-3.1-8b",
    "a100x4-gemma2-27b": "gemma-2-27b",
    "blis-a100": "llama-3.1-8b",
    "niyama-a100": "llama-3.1-8b",
}
"""Each profile with the paper's SLO table for its model."""
FIRST = "a100-llama3.1-8b"
SEED = 0
MAX_PROMPT = 7000
"""Maximum prompt length in tokens on a trace, whose own prompts can exceed an engine's context."""


@dataclass(frozen=True, slots=True)
class Search:
    """A search for the highest rate at which ``policy`` keeps adherence at or above ``hold``."""

    profile: str
    policy: str
    hold: float = 0.9
    duration_s: float = 60.0
    replicas: int = 1
    workload: str = "sharegpt"

    @property
    def command(self) -> str:
        """The same search on the command line, without `--policy`."""
        options = [f"--hold {self.hold:g}"]
        if self.profile != FIRST:
            options.append(f"--profile {self.profile}")
        if PROFILES[self.profile] != "llama-3.1-8b":
            options.append(f"--slo-table {PROFILES[self.profile]}")
        if self.workload != "sharegpt":
            options.append(f"--workload {self.workload} --max-prompt {MAX_PROMPT}")
        if self.duration_s != 60:
            options.append(f"--duration {self.duration_s:g}")
        if self.replicas != 1:
            options.append(f"--replicas {self.replicas}")
        return "antares simulate " + " ".join(options)


def _searches(quick: bool) -> list[Search]:
    if quick:
        return [Search(FIRST, policy, duration_s=0.5) for policy in POLICIES]
    variants: list[dict[str, Any]] = [
        *({"profile": profile} for profile in PROFILES),
        {"profile": FIRST, "hold": 0.99},
        {"profile": FIRST, "duration_s": 300.0},
        {"profile": FIRST, "replicas": 2},
        {"profile": FIRST, "workload": "azure-conv"},
    ]
    return [Search(policy=policy, **variant) for variant in variants for policy in POLICIES]


def measure(lab: Lab, quick: bool) -> Document:
    """Run all searches."""
    searches = _searches(quick)
    # The longest searches start first, so that none of them runs alone at the end.
    order = sorted(searches, key=lambda s: (s.duration_s, s.replicas, POLICIES.index(s.policy)), reverse=True)
    found = dict(zip(order, lab.each("Capacity", capacity_record, order), strict=True))
    profiles = tuple(dict.fromkeys(search.profile for search in searches))
    return new_document(NAME, (SEED,), profiles, capacities=[found[search] for search in searches])


def capacity_record(search: Search) -> Record:
    """The capacity that ``search`` finds, with fields of its run nearest to that rate."""
    workload: dict[str, Any] = {
        "name": search.workload,
        "duration_s": search.duration_s,
        "slo_table": PROFILES[search.profile],
        "max_prompt": None if search.workload == "sharegpt" else MAX_PROMPT,
    }
    experiment = Experiment(search.profile, workload, replicas=search.replicas)
    qps, records = highest_rate(experiment, search.policy, [SEED], search.hold)
    nearest = min(records, key=lambda record: abs(record["qps"] - qps))
    fields = ("slo_adherence", "rejected", "ttft_p99_s", "tpot_p99_s", "count_bound", "fair_bound", "utilisation")
    return {**asdict(search), "command": search.command, "capacity_qps": round(qps, 2), "tries": len(records)} | {
        key: nearest[key] for key in fields
    }


def draw(document: Document, folder: Path) -> list[str]:
    """Draw bars: one group per profile, one bar per policy."""
    records = _with_default_options(document["capacities"])
    profiles = list(dict.fromkeys(record["profile"] for record in records))
    title = f"capacity in requests per second at {records[0]['hold']:.0%} adherence, ShareGPT lengths"
    with canvas(folder / f"{NAME}.png", title, 1, 1, (9, 3.8)) as (figure, ((axes,),)):
        for position, policy in enumerate(POLICIES):
            heights = [matching(records, profile=p, policy=policy)[0]["capacity_qps"] for p in profiles]
            x = [group + (position - (len(POLICIES) - 1) / 2) * 0.28 for group in range(len(profiles))]
            bars = axes.bar(x, heights, 0.27, color=look(policy)[0], label=plot_label(policy))
            axes.bar_label(bars, fmt="%.1f", fontsize=8, padding=2)
        axes.set_xticks(range(len(profiles)), profiles)
        axes.set_ylabel("requests per second")
        axes.grid(axis="x", visible=False)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=len(POLICIES), frameon=False)
    return [f"{NAME}.png"]


def _with_default_options(capacities: list[Record]) -> list[Record]:
    """The records that differ from the first one only in profile and policy."""
    first = capacities[0]
    return matching(capacities, **{key: first[key] for key in ("hold", "duration_s", "replicas", "workload")})


def tables(document: Document) -> str:
    """One row per command, for this page and for docs/planning.md."""
    capacities = document["capacities"]
    rows = []
    for command in dict.fromkeys(record["command"] for record in capacities):
        by_policy = {record["policy"]: record for record in matching(capacities, command=command)}
        rates = [by_policy[policy]["capacity_qps"] for policy in POLICIES]
        stock, slack = by_policy["fcfs"]["capacity_qps"], by_policy["slack"]["capacity_qps"]
        gain = factor_text(slack / stock) if stock else "-"
        rows.append([f"`{command}`", f"`{by_policy['fcfs']['profile']}`", *(f"{rate:.1f}" for rate in rates), gain])
    return table(["command", "profile", *map(policy_label, POLICIES), "`slack` over stock"], rows)


def section(document: Document) -> str:
    """The settings and the table; docs/planning.md explains how to read it."""
    capacities = document["capacities"]
    shortest, longest = (pick(record["duration_s"] for record in capacities) for pick in (min, max))
    exceptions = f" ({longest:g} s where the command says so)" if longest != shortest else ""
    return f"""**Paper.** Not measured. **Here.** The highest Poisson rate, to 2%, at which
{capacities[0]["hold"]:.0%} of all requests attain the paper's SLOs (for Gemma, the paper's table for Gemma). Chunked
prefill, errors of the shipped predictor, seed {SEED}. Arrivals last {shortest:g} s{exceptions}.
[docs/planning.md](../planning.md) explains how to read the table and what the simulation leaves out.

![Capacity of each profile]({NAME}.png)

{tables(document)}
"""


def headline(document: Document) -> str:
    """The capacities of the first profile."""
    records = matching(_with_default_options(document["capacities"]), profile=FIRST)
    rates = ", ".join(f"{policy_label(record['policy'])} {record['capacity_qps']:.1f}/s" for record in records)
    return f"one A100 with Llama-3.1-8B at {records[0]['hold']:.0%} adherence: {rates}"


FIGURE = Figure(NAME, "Capacity of an engine", measure, draw, section, headline)
