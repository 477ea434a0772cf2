"""Writes the result page of `benchmarks.scale.gateways`."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import fmean
from typing import Any

from benchmarks.markdown import table, wrapped

REQUEST_US, EVENT_US = 551, 58
"""CPU time (us) of the whole gateway for a request and for an event of a stream, in docs/results/peers.md."""


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

```
python -m benchmarks.scale.gateways --seeds {len(seeds)} --json docs/results/gateways.json
python -m benchmarks.scale.gateways --page docs/results/gateways.json
```

The first command continues a file that exists, so remove it to measure again."""
    sections = [text for fleet in found["fleets"] for text in _section(fleet, found["runs"])]
    return "\n\n".join([wrapped(head), *sections, *_process()]) + "\n"


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
        text += (
            f" Prompts are cut at {fleet['max_prompt']:,} tokens and answers at {fleet['max_output']} tokens. An A100 "
            "holds 29 whole requests a second ([routing](routing.md)). With them, 10,000 requests a second would need "
            "345 A100s, and a steady load more than 30 s."
        )
    else:
        text += (
            " Turns of chats. Each turn goes to a random gateway, as behind a load balancer that knows no sessions. "
            "One that knows them keeps the hits of one gateway."
        )
    return text


def _process() -> Iterator[str]:
    """Yield what one process can do, everything included."""
    yield "## What one process can do"
    requests, streams = 1e6 / REQUEST_US, 1e6 / (REQUEST_US + 100 * EVENT_US)
    yield wrapped(
        "Decisions are a small part of a gateway's work. With HTTP, prediction and metrics, a request takes "
        f"{REQUEST_US} µs of CPU and each event of a stream {EVENT_US} µs ([measured](peers.md)). That is "
        f"{requests:,.0f} short answers a second, or {streams:,.0f} streams of 100 tokens that begin each second. So "
        "HTTP, not scheduling, sets the number of gateways. A shard also makes each decision of `least_load` cheaper, "
        "because that policy looks at all engines of its gateway."
    )
