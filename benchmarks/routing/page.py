"""Writes the result page of `benchmarks.routing.study`."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import fmean
from typing import Any

from benchmarks.markdown import table, wrapped

OURS, DEFAULT = "headroom", "least_load"


def page(found: dict[str, Any]) -> str:
    """Return the result page of the study's JSON."""
    head = f"""# Routing

**Simulated.** [Routing](../routing.md) explains the policies. Llama-3.1-8B, {found["slots"]} sequences a batch,
{found["duration_s"]:g} s of arrivals, the shipped length predictor. The policy of every engine is `slack`. The six
categories are those of the SCORPIO paper, with its `sharegpt` lengths.

- *Capacity*: the highest rate of the fleet at which {found["keeps"]:.0%} of the requests attain their SLO, as the mean
over the seeds. Each search ends at a precision of {found["precision"]:.1%}.
- *Best other*: the highest capacity of the other policies. A ratio below 1 is a loss of `{OURS}`.
- *Goodput*: requests that attain their SLO, per second of arrivals, of seed 0. S is the capacity of `{DEFAULT}`.
- *Decision*: CPU time of choosing an engine, per request, during the simulation. It includes the sums over the requests
of an engine, which are made again when one ends. The page about [routing](../routing.md#what-does-a-decision-cost) has
the time without them.

```
python -m benchmarks.routing.study{_options(found)} --json docs/results/routing.json
python -m benchmarks.routing.study --page docs/results/routing.json
```

The first command continues a file that exists, so remove it to measure again.

## Capacity of `{OURS}`"""
    rows = []
    for part in found["rows"]:
        capacities = _capacities(part)
        if OURS not in capacities or len(capacities) == 1:
            continue
        ours = capacities.pop(OURS)
        best = max(capacities, key=lambda name: capacities[name])
        ratio = f"{ours / capacities[best]:.2f}x"
        rows.append([part["row"], f"{ours:.0f}", f"{capacities[best]:.0f} (`{best}`)", ratio])
    summary = table(["fleet and traffic", f"`{OURS}`", "best other", "ratio"], rows)
    sections = [text for part in found["rows"] for text in _section(part, found["duration_s"])]
    return "\n\n".join([wrapped(head), summary, *_large(found), *sections]) + "\n"


def _options(found: dict[str, Any]) -> str:
    """Return the options that measure what ``found`` has."""
    seeds = max(one["seed"] for part in found["rows"] for one in part["found"]) + 1
    rows = "" if found.get("large") else "".join(f' --row "{part["row"]}"' for part in found["rows"])
    return f" --seeds {seeds}{rows}"


def _large(found: dict[str, Any]) -> Iterator[str]:
    """Yield the section about more engines."""
    if not found.get("large"):
        return
    yield "## More engines"
    yield wrapped(
        f"`{OURS}` at 95% of its capacity per engine with 8 A100. Capacity is near-linear where adherence is "
        f"{found['keeps']:.0%} or more."
    )
    yield table(
        ["A100s", "rate", "per engine", "adherence", "decision (µs)"],
        [
            [
                str(one["replicas"]),
                f"{one['qps']:.0f}",
                f"{one['qps'] / one['replicas']:.1f}",
                f"{one['slo_adherence']:.4f}",
                f"{one['decision_us']:.0f}",
            ]
            for one in found["large"]
        ],
    )


def _capacities(part: dict[str, Any]) -> dict[str, float]:
    """Return the mean capacity (1/s) of each policy over the seeds that all of them have."""
    by_name: dict[str, dict[int, float]] = {}
    for one in part["found"]:
        by_name.setdefault(one["routing"], {})[one["seed"]] = one["qps"]
    seeds = _seeds(part)
    return {name: fmean(by_seed[seed] for seed in seeds) for name, by_seed in by_name.items()}


def _seeds(part: dict[str, Any]) -> list[int]:
    """Return the seeds that all policies of a row have."""
    names = {one["routing"] for one in part["found"]}
    by_seed: dict[int, set[str]] = {}
    for one in part["found"]:
        by_seed.setdefault(one["seed"], set()).add(one["routing"])
    return sorted(seed for seed, having in by_seed.items() if having == names)


def _goodput(run: dict[str, Any], duration_s: float) -> float:
    """Return the attained requests per second of arrivals. A drain would count against the policy that rejects less."""
    return float(run["slo_adherence"] * run["requests"] / duration_s)


def _section(part: dict[str, Any], duration_s: float) -> Iterator[str]:
    yield f"## {part['row'][0].upper()}{part['row'][1:]}"
    seeds, runs = _seeds(part), {one["routing"]: one["runs"] for one in part["found"] if one["runs"]}
    yield f"Seeds: {', '.join(map(str, seeds))}."
    loads = list(dict.fromkeys(run["load"] for known in runs.values() for run in known))
    heads = ["routing", "capacity", "per engine", "decision (µs)", *(f"goodput at {load:g} S" for load in loads)]
    heads += [f"adherence at {load:g} S" for load in loads]
    rows = []
    for name, qps in _capacities(part).items():
        us = fmean(one["decision_us"] for one in part["found"] if one["routing"] == name)
        by_load = {run["load"]: run for run in runs.get(name, ())}
        rows.append(
            [
                f"`{name}`",
                f"{qps:.0f}",
                f"{qps / part['replicas']:.1f}",
                f"{us:.0f}",
                *(f"{_goodput(by_load[load], duration_s):.1f}" if load in by_load else "" for load in loads),
                *(f"{by_load[load]['slo_adherence']:.3f}" if load in by_load else "" for load in loads),
            ]
        )
    yield table(heads, rows)
