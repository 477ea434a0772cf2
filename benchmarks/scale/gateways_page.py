"""Writes the result page of `benchmarks.scale.gateways`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from statistics import fmean, median
from typing import Any

from benchmarks import results_json
from benchmarks.markdown import table, wrapped
from benchmarks.overhead.peers.report import BURST_CPU, LOAD_CPU, values
from benchmarks.overhead.peers.servers import ANTARES

PEERS = Path(__file__).parents[2] / "docs" / "results" / "peers.json"
"""Results with the CPU time of the whole gateway for a request and for an event of a stream."""


def page(found: dict[str, Any]) -> str:
    """Return the result page of the study's JSON."""
    seeds = sorted({run["seed"] for run in found["runs"]})
    head = f"""# Several gateways

**Simulated.** [Several gateways](../scale.md) divide the engines, and each request goes to a random gateway. The
router, the division and the policy (`slack`) are the product's own. Llama-3.1-8B on A100s, {found["slots"]} sequences
a batch, the six categories of the SCORPIO paper, the shipped length predictor. Seeds: {", ".join(map(str, seeds))}.

- *Goodput*: requests that attain their SLO, per second of arrivals. Rejected requests stay in the denominator of
adherence.
- *Loss*: goodput that is missing, against one gateway in front of all engines.
- *Routing*, *policy*: CPU time per request of choosing the engine, and of the policy's decisions, during the
simulation.
- *Decisions/s*: requests that one process could route and decide on a core, if it did nothing else.

CPU times are those of one of two cores that other work shared. An A100 serves about 30 whole requests a second
([routing](routing.md)). The requests are shortened, so that 100 A100s serve 10,000 a second. Steps have no jitter.
{_spread(seeds)}

```
python -m benchmarks.scale.gateways{_fleets(found)} --seeds {len(seeds)} --json docs/results/gateways.json
python -m benchmarks.scale.gateways --page docs/results/gateways.json
```

The first command continues a file that exists, so remove it to measure again."""
    sections = [text for fleet in found["fleets"] for text in _section(fleet, found["runs"])]
    return "\n\n".join([wrapped(head), *sections, *_process(found)]) + "\n"


def _spread(seeds: list[int]) -> str:
    return "With one seed, differences of 0.1% mean nothing." if len(seeds) == 1 else "Means over the seeds."


def _fleets(found: dict[str, Any]) -> str:
    """Return the options for the fleets that were measured; "" for all."""
    measured = {run["fleet"] for run in found["runs"]}
    names = [fleet["fleet"] for fleet in found["fleets"]]
    return "" if measured >= {*names} else "".join(f' --fleet "{name}"' for name in names if name in measured)


def _section(fleet: dict[str, Any], runs: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the heading, the traffic and the table of one fleet."""
    of_fleet = [run for run in runs if run["fleet"] == fleet["fleet"]]
    if not of_fleet:
        return
    yield f"## {fleet['fleet'][0].upper()}{fleet['fleet'][1:]}"
    yield wrapped(_traffic(fleet))
    hits = any(run["hit_rate"] is not None for run in of_fleet)
    heads = ["routing", "gateways", "engines each", "goodput/s", "loss", "adherence"]
    heads += [*(["prefix hits"] if hits else []), "routing, µs", "policy, µs", "decisions/s of one process"]
    rows = []
    for routing, gateways in dict.fromkeys((run["routing"], run["gateways"]) for run in of_fleet):
        own = _of(of_fleet, routing, gateways)
        whole = {run["seed"]: run["goodput"] for run in _of(of_fleet, routing, 1)}
        losses = [1 - run["goodput"] / whole[run["seed"]] for run in own if run["seed"] in whole]
        decision_us = fmean(run["routing_us"] + run["policy_us"] for run in own)
        rows.append(
            [
                f"`{routing}`",
                str(gateways),
                f"{fleet['engines'] / gateways:g}",
                f"{fmean(run['goodput'] for run in own):,.0f}",
                f"{round(fmean(losses), 3) + 0.0:.1%}" if gateways > 1 and losses else "-",
                f"{fmean(run['slo_adherence'] for run in own):.4f}",
                *([f"{fmean(run['hit_rate'] for run in own):.3f}"] if hits else []),
                f"{fmean(run['routing_us'] for run in own):.0f}",
                f"{fmean(run['policy_us'] for run in own):.0f}",
                f"{1e6 / decision_us:,.0f}",
            ]
        )
    yield table(heads, rows)


def _of(runs: list[dict[str, Any]], routing: str, gateways: int) -> list[dict[str, Any]]:
    return [run for run in runs if (run["routing"], run["gateways"]) == (routing, gateways)]


def _traffic(fleet: dict[str, Any]) -> str:
    """Return what arrives, and how the requests were shortened."""
    text = f"{fleet['qps']:,.0f} requests a second on {fleet['engines']} A100s, for {fleet['duration_s']:g} s."
    if fleet["max_output"]:
        text += f" Prompts are cut at {fleet['max_prompt']:,} tokens and answers at {fleet['max_output']} tokens."
    else:
        text += (
            " Turns of chats. Each turn goes to a random gateway, as behind a load balancer that knows no sessions. "
            "One that knows them keeps the hits of one gateway."
        )
    return text


def _process(found: dict[str, Any]) -> Iterator[str]:
    """Yield what one process can do, everything included, and why shards were chosen."""
    yield "## What one process can do"
    runs = results_json.read(PEERS)["runs"]
    request_us, event_us = (median(values(runs, ANTARES, column)) for column in (LOAD_CPU, BURST_CPU))
    requests, streams = 1e6 / request_us, 1e6 / (request_us + 100 * event_us)
    yield wrapped(
        "HTTP, prediction and metrics come on top of the decisions. With one engine, a whole request takes "
        f"{request_us:.0f} µs of CPU and each event of a stream {event_us:.0f} µs ([measured](peers.md)). That is "
        f"{requests:,.0f} short answers a second, or {streams:,.0f} streams of 100 tokens that begin each second. So "
        "the length of streams sets the number of gateways."
    )
    first = found["fleets"][0]
    whole = [run for run in found["runs"] if (run["fleet"], run["gateways"]) == (first["fleet"], 1)]
    if whole:
        cores = first["qps"] * (whole[0]["routing_us"] + whole[0]["policy_us"]) / 1e6
        yield wrapped(
            "The alternative is one process that decides for many HTTP processes. At "
            f"{first['qps']:,.0f} requests a second its decisions alone need {cores:.1f} cores with "
            f"`{whole[0]['routing']}`, and a process has one. Its loss would stop all requests. So gateways divide the "
            "engines."
        )
