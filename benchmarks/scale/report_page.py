"""The page about the report channel: paced requests with and without it, and what a report costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import numpy as np

from benchmarks.markdown import table, wrapped

DEFAULT_ROUNDS = 3

_ARMS = ("without", "with")


def page(found: dict[str, Any]) -> str:
    """Return the page: the set-up, the commands, a column for each gateway, and the cost by step time."""
    records, costs, rounds = found["records"], found["costs"], found["rounds"]
    groups = [[record for record in records if record["arm"] == arm] for arm in _ARMS]
    rows = [[name, *(cell(group) for group in groups)] for name, cell in _rows(found["soon_s"])]
    shortest, longest = found["batch_tokens"]
    options = f"--seed {found['seed']} " if found["seed"] else ""
    options += f"--rounds {rounds} " if rounds != DEFAULT_ROUNDS else ""
    text = f"""# The report channel

A vLLM server with the scheduler class [reports](../architecture.md#how-does-a-remote-engine-report) its steps, queue and KV
memory to `kind: http` gateways with `report`. `slack` then counts on best-effort preemption there. This page measures
what that is worth to paced requests, and what reports cost.

```
python -m benchmarks.scale.report_channel {options}--json > docs/results/report_channel.json
python -m benchmarks.scale.report_channel --page docs/results/report_channel.json
```

## Paced requests while best-effort ones hold all slots

Real HTTP and one vLLM on CPU with {found["slots"]} slots and a small random model. Two gateways with the default policy share it;
one of them connects to the report channel. All run on one machine with {found["cpus"]} shared cores, which other programs used too.

{found["batch_clients"]} best-effort clients send one request of {shortest} to {longest} tokens after the other, so all slots are
taken and others wait. Every {found["paced_every_s"]:g} s a paced request of {found["paced_tokens"]} tokens arrives, for
{found["round_s"]:g} s a round. The gateways take turns; {rounds} rounds. The TTFT bound is 60 s, so that no paced request is rejected
for its wait.

{table(["", "without the channel", "with the channel"], rows)}

- TTFT is what the client measured, over all rounds. *tokens/s* are those of all requests, from the server's own counter.
- Without the channel, a paced request waits until a best-effort one ends.
- With it, the newest best-effort request is preempted and computed again later. Its slot stays free for paced requests for ten
  seconds. This reduces the throughput to {_ratio(groups)} of that without the channel in the same round.

## What a report costs

Both ends are the product's, connected over TCP on the same machine. A loop stands for the engine: it sleeps for a step and
reports it. The scheduler sends at most every 50 ms, so reports of fast steps hold several. CPU time is that of the threads, in
microseconds a step (share of the step), with heartbeats and wake-ups. *engine* delays the next step, the others do not.

{table(["step, ms", "engine, µs", "sending thread, µs", "gateway, µs", "bytes a step", "bytes/s"], [_cost(cost) for cost in costs])}

{_kept(costs)}

Failed checks:

{chr(10).join(f"- {line}" for line in found["problems"]) or "None."}
"""  # noqa: E501 - a table
    return wrapped(text) + "\n"


def _cost(cost: dict[str, Any]) -> list[str]:
    names = ("engine_us", "sender_us", "gateway_us")
    times = [f"{cost[name]:.0f} ({cost[name] / cost['step_ms'] / 1000:.1%})" for name in names]
    return [f"{cost['step_ms']:g}", *times, f"{cost['bytes']:.0f}", f"{cost['bytes_per_s']:,}"]


def _kept(costs: Sequence[dict[str, Any]]) -> str:
    steps, received = (sum(cost[name] for cost in costs) for name in ("steps", "received_steps"))
    return f"Of {steps:,} steps, {received:,} reached the gateway."


def _rows(soon_s: float) -> tuple[tuple[str, Callable[[Sequence[dict[str, Any]]], str]], ...]:
    return (
        ("paced requests", lambda group: f"{_sum(group, 'paced'):.0f}"),
        ("served", lambda group: f"{_sum(group, 'served'):.0f}"),
        ("rejected", lambda group: f"{_sum(group, 'rejected'):.0f}"),
        ("TTFT p50, s", lambda group: _quantile(group, 0.5)),
        ("TTFT p90, s", lambda group: _quantile(group, 0.9)),
        ("TTFT maximum, s", lambda group: _quantile(group, 1.0)),
        (f"first token within {soon_s:g} s", lambda group: f"{_sum(group, 'soon') / _sum(group, 'paced'):.0%}"),
        ("best-effort preemptions", lambda group: f"{_sum(group, 'preemptions'):.0f}"),
        ("tokens/s, median (range) of rounds", _throughput),
    )


def _sum(group: Sequence[dict[str, Any]], name: str) -> float:
    return float(sum(record[name] for record in group))


def _quantile(group: Sequence[dict[str, Any]], q: float) -> str:
    values = [value for record in group for value in record["ttft_s"]]
    return f"{float(np.quantile(values, q)):.2f}" if values else "-"


def _ratio(groups: Sequence[Sequence[dict[str, Any]]]) -> str:
    """Return the throughput with the channel over that without, median and range of the rounds."""
    without, with_channel = ({record["round"]: record["tokens_per_s"] for record in group} for group in groups)
    ratios = [with_channel[number] / without[number] for number in without]
    return f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def _throughput(group: Sequence[dict[str, Any]]) -> str:
    values = [record["tokens_per_s"] for record in group]
    return f"{median(values):.0f} ({min(values):.0f} to {max(values):.0f})"
