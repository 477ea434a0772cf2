"""Writes docs/results/isolation.md from the JSON of `benchmarks.isolation.study`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from benchmarks.markdown import table, wrapped

Run = Mapping[str, Any]

LABELS = {
    "": "none",
    "flood": "the victim's own classes",
    "class": "one class: 1 s, 50 ms",
    "patient": "TTFT bounds of 60 s",
    "tight": "bounds of 0.2 s and 20 ms",
    "loose": "TPOT bounds of 200 ms",
    "short": "declares 1 output token, takes about 270",
    "long": "declares 2,000 output tokens, takes about 270",
    "prompts": "prompts of 4,000 tokens, TTFT bounds of 10 s",
    "best_effort": "no bounds",
    "no_ttft": "no TTFT bound, 50 ms",
}
"""What the abuser sends, by kind."""


_COMMANDS = """```
python -m benchmarks.isolation.study --json docs/results/isolation.json
python -m benchmarks.isolation.study --page docs/results/isolation.json
```"""


def spread(runs: Sequence[Run], key: str, digits: int) -> str:
    """Return the median and the range of ``key``."""
    values = [run[key] for run in runs]
    return f"{median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def lost_points(runs: Sequence[Run]) -> list[float]:
    """Return by how many points each run of `slack` lowers the victim's adherence, against the same seed alone."""
    own = [run for run in runs if run["policy"] == "slack" and run["shares"]]
    alone = {run["seed"]: run["victim"] for run in own if not run["kind"]}
    return [100 * (alone[run["seed"]] - run["victim"]) for run in own if run["kind"]]


def page(document: Mapping[str, Any]) -> str:
    """Return the page in Markdown."""
    runs: list[Run] = document["runs"]
    lost = lost_points(runs)
    rows = []
    for kind in dict.fromkeys(run["kind"] for run in runs):
        own, before = ([r for r in runs if (r["policy"], r["shares"], r["kind"]) == ("slack", s, kind)] for s in (1, 0))
        abuser = [spread(each, "abuser", 1) if kind else "" for each in (own, before)]
        rows.append([LABELS[kind], spread(own, "victim", 3), spread(before, "victim", 3), *abuser])
    others = [policy for policy in dict.fromkeys(run["policy"] for run in runs) if policy != "slack"]
    kinds = [kind for kind in LABELS if any(run["kind"] == kind and run["policy"] in others for run in runs)]
    found = [
        [policy, *(spread([r for r in runs if (r["policy"], r["kind"]) == (policy, k)], "victim", 3) for k in kinds)]
        for policy in others
    ]
    head = f"""**Simulated**: an A100 with Llama-3.1-8B in virtual time, 40 s of arrivals, seeds
        {", ".join(map(str, document["seeds"]))}. The victim offers 10 requests/s of the ShareGPT workload with the six
        SLO classes of the paper. The abuser offers 200/s. Both are tenants of weight 1. Numbers are medians, with the
        range over the seeds. *Victim*: the share of its requests that attain their SLO. *Abuser*: its attained requests
        per second."""
    result = f"""Under `slack` no abuse lowers the victim's adherence by more than **{max(lost):.1f} points** in any
        run (median {median(lost):.1f}). *Without*: the same requests, all of one tenant. What the abuser attains less
        is the cost of isolation: its prompts wait for the victim's, and part of each step is kept free for these."""
    sections = [
        "# One tenant beside an abuser",
        wrapped(head),
        wrapped(result),
        table(["abuser sends", "victim", "victim, without", "abuser", "abuser, without"], rows),
        "## Other policies",
        "They do not know tenants. The victim's adherence:",
        table(["policy", *(LABELS[kind] for kind in kinds)], found),
        "## How to repeat",
        _COMMANDS,
    ]
    return "\n\n".join(sections) + "\n"
