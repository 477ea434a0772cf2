"""How many requests per second an engine holds at these SLOs: `antares simulate --hold`, for docs/planning.md."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.figures.drawing import canvas, look
from benchmarks.figures.figure import Document, Figure, document
from benchmarks.figures.lab import Lab
from benchmarks.figures.records import Record, name_of, of, table, times
from lab.simulate.experiment import Experiment
from lab.simulate.experiment import capacity as highest_rate

NAME = "capacity"
POLICIES = ("fcfs", "scorpio")
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
LONGEST_PROMPT = 7000
"""Of a trace: its own may be longer than an engine's context."""


@dataclass(frozen=True, slots=True)
class Search:
    """What is looked for: the highest rate at which ``policy`` attains ``hold`` of all requests."""

    profile: str
    policy: str
    hold: float = 0.9
    duration_s: float = 60.0
    replicas: int = 1
    workload: str = "sharegpt"

    @property
    def command(self) -> str:
        """The same on the command line, but for `--policy`."""
        options = [f"--hold {self.hold:g}"]
        if self.profile != FIRST:
            options.append(f"--profile {self.profile}")
        if PROFILES[self.profile] != "llama-3.1-8b":
            options.append(f"--slo-table {PROFILES[self.profile]}")
        if self.workload != "sharegpt":
            options.append(f"--workload {self.workload} --max-prompt {LONGEST_PROMPT}")
        if self.duration_s != 60:
            options.append(f"--duration {self.duration_s:g}")
        if self.replicas != 1:
            options.append(f"--replicas {self.replicas}")
        return "antares simulate " + " ".join(options)


def _searches(quick: bool) -> list[Search]:
    if quick:
        return [Search(FIRST, policy, duration_s=2.0) for policy in POLICIES]
    kinds: list[dict[str, Any]] = [
        *({"profile": profile} for profile in PROFILES),
        {"profile": FIRST, "hold": 0.99},
        {"profile": FIRST, "duration_s": 300.0},
        {"profile": FIRST, "replicas": 2},
        {"profile": FIRST, "workload": "azure-conv"},
    ]
    return [Search(policy=policy, **kind) for kind in kinds for policy in POLICIES]


def measure(lab: Lab, quick: bool) -> Document:
    """Every search."""
    searches = _searches(quick)
    # The longest first, so that no process ends up with one of them alone.
    order = sorted(searches, key=lambda s: (s.duration_s, s.replicas, s.policy == "scorpio"), reverse=True)
    found = dict(zip(order, lab.each("Capacity", held, order), strict=True))
    profiles = tuple(dict.fromkeys(search.profile for search in searches))
    return document(NAME, (SEED,), profiles, capacities=[found[search] for search in searches])


def held(search: Search) -> Record:
    """The rate, and what the run at about that rate looked like."""
    workload: dict[str, Any] = {
        "name": search.workload,
        "duration_s": search.duration_s,
        "slo_table": PROFILES[search.profile],
        "max_prompt": None if search.workload == "sharegpt" else LONGEST_PROMPT,
    }
    experiment = Experiment(search.profile, workload, replicas=search.replicas)
    qps, records = highest_rate(experiment, search.policy, [SEED], search.hold)
    at = min(records, key=lambda record: abs(record["qps"] - qps))
    kept = ("slo_adherence", "rejected", "ttft_p99_s", "tpot_p99_s", "count_bound", "fair_bound", "utilisation")
    return {**asdict(search), "command": search.command, "capacity_qps": round(qps, 2), "tries": len(records)} | {
        key: at[key] for key in kept
    }


def draw(made: Document, folder: Path) -> list[str]:
    """Bars: the profiles, two policies each."""
    plain = _plain(made["capacities"])
    names = list(dict.fromkeys(one["profile"] for one in plain))
    title = f"requests per second with {plain[0]['hold']:.0%} attained, ShareGPT lengths"
    with canvas(folder / f"{NAME}.png", title, 1, 1, (9, 3.8)) as (figure, ((axes,),)):
        for place, policy in enumerate(POLICIES):
            heights = [of(plain, profile=profile, policy=policy)[0]["capacity_qps"] for profile in names]
            x = [group + (place - 0.5) * 0.36 for group in range(len(names))]
            label = "fcfs (stock vLLM)" if policy == "fcfs" else policy
            bars = axes.bar(x, heights, 0.34, color=look(policy)[0], label=label)
            axes.bar_label(bars, fmt="%.1f", fontsize=8, padding=2)
        axes.set_xticks(range(len(names)), names)
        axes.set_ylabel("requests per second")
        axes.grid(axis="x", visible=False)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    return [f"{NAME}.png"]


def _plain(capacities: list[Record]) -> list[Record]:
    first = capacities[0]
    same = {key: first[key] for key in ("hold", "duration_s", "replicas", "workload")}
    return of(capacities, **same)


def tables(made: Document) -> str:
    """Profiles side by side, and what changes the answer on the first; for this page and for docs/planning.md."""
    rows = []
    for command in dict.fromkeys(one["command"] for one in made["capacities"]):
        at = {one["policy"]: one for one in of(made["capacities"], command=command)}
        stock, ours = at["fcfs"]["capacity_qps"], at["scorpio"]["capacity_qps"]
        gain = times(ours / stock) if stock else "-"
        rows.append([f"`{command}`", f"`{at['fcfs']['profile']}`", f"{stock:.1f}", f"{ours:.1f}", gain])
    return table(["command", "profile", *map(name_of, POLICIES), "`scorpio` over stock"], rows)


def section(made: Document) -> str:
    """The table; how to read it stands in docs/planning.md."""
    shortest, longest = (pick(one["duration_s"] for one in made["capacities"]) for pick in (min, max))
    return f"""**The paper** does not ask this. **Here** the highest Poisson rate, to 2%, of which
{made["capacities"][0]["hold"]:.0%} of all requests attain the paper's SLOs (its own
table for Gemma): chunked steps, shipped predictor's errors, seed {SEED}, {shortest:g} s of
arrivals{f" ({longest:g} s where it says so)" if longest != shortest else ""}. [How to read it, and
what it leaves out](../planning.md).

![Rates held]({NAME}.png)

{tables(made)}
"""


def headline(made: Document) -> str:
    """The answer for the first profile."""
    plain = of(_plain(made["capacities"]), profile=FIRST)
    got = ", ".join(f"{name_of(one['policy'])} {one['capacity_qps']:.1f}/s" for one in plain)
    return f"one A100 with Llama-3.1-8B, {plain[0]['hold']:.0%} attained: {got}"


FIGURE = Figure(NAME, "What an engine holds", measure, draw, section, headline)
