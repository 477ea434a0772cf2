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
{found["duration_s"]:g} s of arrivals, steps with 10% jitter, the shipped length predictor. The policy of every engine
is `slack`. The six categories are those of the SCORPIO paper, with its `sharegpt` lengths.{_one_pace(found)}

- *Capacity*: the highest rate of the fleet at which {found["keeps"]:.0%} of the requests attain their SLO, as the mean
over the seeds. Each row states the precision of the search.
- *Best other*: the highest capacity of the other policies. *Ratio*: the capacity of
`{OURS}` divided by that one, over the seeds that both have. Below 1 it is a loss.
- *Goodput*: requests that attain their SLO, per second of arrivals, of seed 0. S is the capacity of `{DEFAULT}`.
- *Decision*: CPU time of choosing an engine, per request, during the simulation. It includes the sums over the requests
of an engine. The page about [routing](../routing.md#what-does-a-decision-cost) has the time with 100 requests on each
engine. Other work shared the machine, so compare times in a row only.

Without shared prefixes, `prefix_affinity` is `least_requests`. On multi-turn traffic it also runs with settings that
balance earlier than SGLang's defaults: the least difference of requests, and the least ratio. `most_free_memory` is the
mapper of the annealing paper, for one request at a time. The other policies have nothing to tune.

```
python -m benchmarks.routing.study --seeds {_seeds(found)} --json docs/results/routing.json
python -m benchmarks.routing.study --page docs/results/routing.json
```

The first command continues a file that exists, so remove it to measure again. {_fewer_seeds(found)}

## Capacity of `{OURS}`"""
    rows = []
    for part in found["rows"]:
        capacities = {name: fmean(by_seed.values()) for name, by_seed in _capacities(part).items()}
        if OURS not in capacities or len(capacities) == 1:
            continue
        ours = capacities.pop(OURS)
        best = max(capacities, key=lambda name: capacities[name])
        rows.append([part["row"], _rate(ours), f"{_rate(capacities[best])} (`{best}`)", f"{_ratio(part, best):.2f}x"])
    summary = table(["fleet and traffic", f"`{OURS}`", "best other", "ratio"], rows)
    sections = [text for part in found["rows"] for text in _section(part)]
    return "\n\n".join([wrapped(head), summary, *_default(found), *_large(found), *sections]) + "\n"


def _default(found: dict[str, Any]) -> Iterator[str]:
    """Yield what speaks for and against `OURS` as the default, by the numbers of the rows that have both."""
    parts = [part for part in found["rows"] if {OURS, DEFAULT} <= _capacities(part).keys()]
    ratios = [_ratio(part, DEFAULT) for part in parts]
    losses = [f"{part['row']}" for part, ratio in zip(parts, ratios, strict=True) if ratio < 1]
    by_run = {(part["row"], run["routing"], run["load"]): run["goodput"] for part in parts for run in part["runs"]}
    gains = [
        goodput / by_run[row, DEFAULT, load]
        for (row, routing, load), goodput in by_run.items()
        if routing == OURS and (row, DEFAULT, load) in by_run
    ]
    times = [_routing_us(part, OURS) / _routing_us(part, DEFAULT) for part in parts]
    if not gains:
        return
    yield f"## Should `{OURS}` be the default?"
    yield wrapped(
        f"""For it, against `{DEFAULT}` in the rows with a capacity:

- Capacity: {min(ratios):.2f}x to {max(ratios):.2f}x.{"" if losses else " No row has less."}
- Goodput at their multiples of S: {min(gains):.2f}x to {max(gains):.2f}x.
- Time of a decision: {min(times):.2f}x to {max(times):.2f}x.

Against it:

{f"- It has less capacity in this row: {'; '.join(losses)}." if losses else ""}
- All of this is simulated, with a steady mix of paces and engines that report their KV memory. A mix that changes, and
real servers, have not been measured.
- Under the policy `annealing`, `{DEFAULT}` balances KV memory as the paper does; `{OURS}` does not.
- At low load it uses some engines more than others.

So `{DEFAULT}` is the default, and [`routing.name`](../configuration.md#routing) selects `{OURS}`."""
    )


def _fewer_seeds(found: dict[str, Any]) -> str:
    """Return a sentence if some rows have fewer seeds than others."""
    counts = {len(by_seed) for part in found["rows"] for by_seed in _capacities(part).values()}
    return "Rows with one seed show a trend only." if len(counts) > 1 else ""


def _one_pace(found: dict[str, Any]) -> str:
    """Return what the row with a single pace has, if it was measured."""
    measured = any(part["row"].startswith("one pace") for part in found["rows"])
    return " *One pace*: the three of them with 50 ms per token." if measured else ""


def _rate(qps: float) -> str:
    """Return a capacity with three digits."""
    return f"{qps:.1f}" if qps < 100 else f"{qps:.0f}"


def _seeds(found: dict[str, Any]) -> int:
    """Return the number of seeds of the policy that has most."""
    return max((int(one["seed"]) for part in found["rows"] for one in part["found"]), default=0) + 1


def _large(found: dict[str, Any]) -> Iterator[str]:
    """Yield the section about more engines."""
    near = [one for one in found["large"] if one["of"] == OURS]
    loaded = [one for one in found["large"] if one["of"] == DEFAULT]
    if near or loaded:
        yield "## More engines"
    if near:
        yield wrapped(
            f"`{OURS}` at 95% of its capacity per engine in the row of the same traffic with 8 engines. Capacity is "
            f"near-linear where adherence is {found['keeps']:.0%} or more."
        )
        yield table(
            ["fleet and traffic", "arrivals (s)", "rate", "per engine", "adherence", "decision (µs)"],
            [
                [
                    _large_name(one),
                    f"{one['duration_s']:g}",
                    f"{one['qps']:.0f}",
                    f"{one['qps'] / one['replicas']:.1f}",
                    f"{one['slo_adherence']:.4f}",
                    f"{one['routing_us']:.0f}",
                ]
                for one in near
            ],
        )
    if loaded:
        yield wrapped(
            f"At S and 2 S. S is the capacity of `{DEFAULT}` per engine in the row of the same traffic with 8 engines. "
            f"With fewer than {found['duration_s']:g} s of arrivals a run ends while its load still grows: "
            "compare such runs with each other only."
        )
        yield table(
            ["fleet and traffic", "arrivals (s)", "routing", "load", "rate", "goodput", "adherence", "decision (µs)"],
            [
                [
                    _large_name(one),
                    f"{one['duration_s']:g}",
                    f"`{one['routing']}`",
                    f"{one['load']:g} S",
                    f"{one['qps']:.0f}",
                    f"{one['goodput']:.0f}",
                    f"{one['slo_adherence']:.3f}",
                    f"{one['routing_us']:.0f}",
                ]
                for one in loaded
            ],
        )


def _large_name(one: dict[str, Any]) -> str:
    """Return fleet and traffic of a run: those of its row with more engines."""
    traffic, replicas = one["row"].split(", ")[0], one["replicas"]
    fleet = f"{replicas // 2} A100 and {replicas // 2} H200" if "H200" in one["row"] else f"{replicas} A100"
    return f"{traffic}, {fleet}"


def _capacities(part: dict[str, Any]) -> dict[str, dict[int, float]]:
    """Return the capacity (1/s) of each policy with each of its seeds, `DEFAULT` and `OURS` first."""
    by_name: dict[str, dict[int, float]] = {}
    for one in sorted(part["found"], key=lambda one: (one["routing"] != DEFAULT, one["routing"] != OURS)):
        by_name.setdefault(one["routing"], {})[one["seed"]] = one["qps"]
    return by_name


def _ratio(part: dict[str, Any], other: str) -> float:
    """Return the capacity of `OURS` over that of ``other``, as means over the seeds that both have."""
    ours, theirs = _capacities(part)[OURS], _capacities(part)[other]
    seeds = ours.keys() & theirs.keys()
    return fmean(ours[seed] for seed in seeds) / fmean(theirs[seed] for seed in seeds)


def _routing_us(part: dict[str, Any], routing: str) -> float:
    """Return the mean CPU time (us) of a decision of ``routing``."""
    return fmean(one["routing_us"] for one in part["found"] if one["routing"] == routing)


def _section(part: dict[str, Any]) -> Iterator[str]:
    yield f"## {part['row'][0].upper()}{part['row'][1:]}"
    yield f"Precision of a capacity: {part['precision']:.2%}."
    runs = {(run["routing"], run["load"]): run for run in part["runs"]}
    loads = sorted({load for _, load in runs})
    heads = ["routing", "seeds", "capacity", "per engine", "decision (µs)"]
    heads += [*(f"goodput at {load:g} S" for load in loads), *(f"adherence at {load:g} S" for load in loads)]
    rows = []
    for name, by_seed in _capacities(part).items():
        qps = fmean(by_seed.values())
        own = [runs.get((name, load)) for load in loads]
        rows.append(
            [
                f"`{name}`",
                ", ".join(map(str, sorted(by_seed))),
                _rate(qps),
                f"{qps / part['replicas']:.1f}",
                f"{_routing_us(part, name):.0f}",
                *(f"{run['goodput']:.1f}" if run else "" for run in own),
                *(f"{run['slo_adherence']:.3f}" if run else "" for run in own),
            ]
        )
    yield table(heads, rows)
