"""Writes docs/results/autoscaling.md from the JSON of `benchmarks.autoscaling.study`."""

from __future__ import annotations

from itertools import pairwise
from statistics import fmean
from typing import Any

from benchmarks.autoscaling.setting import COLD_START_S, EVERY_S, POLICY, PROFILE, STABILISE_S, TARGET, WINDOW_S
from benchmarks.markdown import table, wrapped


def windows(trace: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the search's number for each window, and the wanted replicas from that window and from the one before."""
    wanted = {one["end_s"]: one["wanted"] for one in trace["signals"]}
    starts = [WINDOW_S * number for number in range(len(trace["searched"]))]
    return [
        {"searched": needed, "same": wanted[start + WINDOW_S], "before": wanted.get(start)}
        for start, needed in zip(starts, trace["searched"], strict=True)
    ]


def page(found: dict[str, Any]) -> str:
    """Return the page of the results."""
    traces = found["traces"]
    every = [window for trace in traces for window in windows(trace)]
    same = [abs(w["same"] - w["searched"]) for w in every]
    before = [abs(w["before"] - w["searched"]) for w in every if w["before"] is not None]

    def within(errors: list[int], most: int) -> str:
        return f"{sum(error <= most for error in errors)} of {len(errors)}"

    steps = [abs(later - earlier) for t in traces for earlier, later in pairwise(t["searched"])]
    accuracy = table(
        ["compared with the search of a window", "equal", "within one", "largest difference"],
        [
            ["wanted replicas of the same window", within(same, 0), within(same, 1), str(max(same, default=0))],
            ["wanted replicas of the window before", within(before, 0), within(before, 1), str(max(before, default=0))],
            ["the search of the window before", within(steps, 0), within(steps, 1), str(max(steps, default=0))],
        ],
    )
    rows = [
        [t["trace"], run["name"], f"{run['adherence']:.4f}", f"{run['gpu_hours']:.2f}", str(run["most"])]
        for t in traces
        for run in t["fleets"]
    ]
    sizes = "\n".join(f"- {t['trace']}: {', '.join(map(str, t['searched']))}" for t in traces)
    attained = "\n".join(f"- The target is attained on {t['trace']} by {_attaining(t)}." for t in traces)
    signals = [one for t in traces for one in t["signals"]]
    jitter = f"steps with {found['step_jitter']:.0%} jitter" if found.get("step_jitter") else "steps without jitter"
    cpu = fmean(one["cpu_s"] for one in signals)
    sampled = fmean(one["sampled"] for one in signals)
    return f"""# Autoscaling by wanted replicas

{
        wrapped(f'''
Simulated. Azure's traces at {traces[0]['rate_scale']:g} times their rate (overlaid copies), the first
{traces[0]['minutes']:g} minutes; profile `{PROFILE}`, policy `{POLICY}`, the six SLO categories, prompts of at most
7,000 tokens, {jitter}, seed {traces[0]['seed']}. The target is {TARGET:.0%} of the requests.
The signal is computed every {EVERY_S:g} s from the last {WINDOW_S:g} s;
it takes {cpu:.1f} s of CPU time and simulates {sampled:.0%} of the requests on average. It gets the true lengths and
the step times of the profile; a gateway estimates the lengths of answers that did not end, and learns step times.''')
    }

## Wanted replicas against the search

{
        wrapped(f'''A *window* is {WINDOW_S:g} s of the trace. The *search* simulates all requests of a window on more
and fewer engines, and finds the fewest that attain the target.''')
    }

{accuracy}

{
        wrapped(f'''An autoscaler acts on the past, so what it gets is the second row. It is limited by how much the
traffic changes, as the third one shows. The search finds, window by window:

{sizes}''')
    }

## Adherence and GPU hours

{table(["trace", "fleet", "adherence", "GPU hours", "most engines"], rows)}

{
        wrapped(f'''
- An engine serves {COLD_START_S:g} s after it is started, and its GPU counts from the start until it has drained.
- The static fleets know the whole trace beforehand.
- Queue-length scaling is Kubernetes' rule every 15 s. An operator would not know the best of these targets beforehand.
- All scale down to the highest number of the last {STABILISE_S:g} s.
- Wanted replicas are late by construction: they know the last {WINDOW_S:g} s only, and a new engine takes
  {COLD_START_S:g} s more.
{attained}''')
    }

## How to repeat

```
{found["command"]} --json docs/results/autoscaling.json
python -m benchmarks.autoscaling.study --page docs/results/autoscaling.json
```

The first command continues a file that exists, so remove it to measure again.
"""


def _attaining(trace: dict[str, Any]) -> str:
    """Name the fleets of ``trace`` that attain the target, the one with the fewest GPU hours first."""
    kept = sorted((run for run in trace["fleets"] if run["adherence"] >= TARGET), key=lambda run: run["gpu_hours"])
    return ", ".join(f"*{run['name']}* ({run['gpu_hours']:.2f} GPU hours)" for run in kept) or "none"
