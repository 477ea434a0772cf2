"""Writes ``docs/results/fidelity.md`` from what `benchmarks.fidelity` measured.

python -m benchmarks.fidelity_page docs/results/fidelity.json
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

WITHIN = {"adherence": 0.05, "ttft": 0.15, "tpot": 0.15}
"""How close the simulator is asked to be: points of adherence, and shares of the two medians."""

_HEAD = """# How far can the simulator be believed?

The same workloads were sent to a real engine and played in the simulator, with the same policies and the same seeds.
**Real:** {real}; real HTTP, the gateway and the load client on the same two shared cores. **Not a GPU.**

| policy | load | | adherence | TTFT p50 s | TPOT p50 s |
|---|---|---|---|---|---|
"""

_TAIL = """
{verdict}

{requests} requests a run, Poisson; load 1 is {capacity} requests/s, what the engine completes of this workload with
32 in flight. Bounds: the paper's table for Llama-3.1-8B times {scale:g}. Output lengths are known to both sides. In
brackets: how far off the simulator is, in points of adherence and in per cent of the medians. *Drift* is the median of
what the run's own steps took over what the profile says of them. The profile (`cpu-smollm2`,
[profiles](../profiles.md)) comes from other workloads, served just before by the same engine through the same gateway.
Held-out steps: {quality}.

**What the simulator needed:** the gateway and the client share the cores with the engine, so the profile must be learnt
with them at work. The gateway reacts to a step only when the next has begun.

**What it lacks:** a policy that holds requests back lets them in when an estimate falls below a threshold, and a first
token waits for that moment. The real policy has learnt its step times on a path of its own; the simulated one is told
the profile's; and the machine, which others use too, does not keep its speed. Batch, pace and adherence hardly notice.
The median wait under `scorpio` does. In a later session (80 requests a run, stopped half way, its JSON not kept) the
machine became 10 to 22% slower after the profile was learnt, and even `fcfs` at load 1, right at the edge of its
bounds, was off by 43 points of adherence: the simulator is as good as the profile is of today's machine.

```
python -m benchmarks.fidelity --requests {requests} --seed {seed} --json > docs/results/fidelity.json
python -m benchmarks.fidelity_page docs/results/fidelity.json
```
"""


def page(found: dict[str, Any]) -> str:
    """The page for a document of `benchmarks.fidelity`."""
    rows = []
    for pair in found["pairs"]:
        real, simulated = pair["real"], pair["simulated"]
        at = f"{pair['load']:g} ({pair['qps']:.2f}/s)"
        rows.append(f"| `{pair['policy']}` | {at} | real | {_cells(real)} |")
        rows.append(f"| | drift {pair['drift']:.2f} | simulated | {_cells(simulated, pair)} |")
    quality = "; ".join(
        f"{kind} R2 {value['r2']:.3f}, MAPE {value['mape']:.1%}" for kind, value in found["profile_quality"].items()
    )
    tail = _TAIL.format(
        verdict=verdict(found["pairs"]),
        requests=found["pairs"][0]["requests"],
        capacity=found["capacity_rps"],
        scale=found["slo_scale"],
        quality=quality,
        seed=found["seed"],
    )
    return _HEAD.format(real=found["real"]) + "\n".join(rows) + "\n" + tail


def _cells(figures: dict[str, Any], off: dict[str, Any] | None = None) -> str:
    cells = [f"{figures['slo_adherence']:.3f}", f"{figures['ttft_p50_s']:.3f}", f"{figures['tpot_p50_s']:.4f}"]
    if off is not None:
        apart = (f"{off['adherence_off'] * 100:+.1f}", f"{off['ttft_p50_off']:+.0%}", f"{off['tpot_p50_off']:+.0%}")
        cells = [f"{cell} ({much})" for cell, much in zip(cells, apart, strict=True)]
    return " | ".join(cells)


def verdict(pairs: list[dict[str, Any]]) -> str:
    """A sentence: how many runs are within what is asked, and the worst of each figure."""
    offs = {
        "adherence": [abs(pair["adherence_off"]) for pair in pairs],
        "ttft": [abs(pair["ttft_p50_off"]) for pair in pairs],
        "tpot": [abs(pair["tpot_p50_off"]) for pair in pairs],
    }
    within = sum(all(offs[key][i] <= most for key, most in WITHIN.items()) for i in range(len(pairs)))
    return (
        f"**{within} of {len(pairs)} runs** are within 5 points of adherence and 15% of both medians; the worst are "
        f"off by {max(offs['adherence']) * 100:.1f} points, {max(offs['ttft']):.0%} (TTFT) and "
        f"{max(offs['tpot']):.0%} (TPOT)."
    )


def main(file: Annotated[Path, typer.Argument(help="The JSON of `benchmarks.fidelity`.")]) -> None:
    """Write the page beside ``file``."""
    file.with_suffix(".md").write_text(page(json.loads(file.read_text(encoding="utf-8"))), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
