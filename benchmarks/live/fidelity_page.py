"""Writes ``docs/results/fidelity.md`` from what `benchmarks.live.fidelity` measured.

python -m benchmarks.live.fidelity_page docs/results/fidelity.json
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

WITHIN = {"adherence": 0.05, "ttft_p50": 0.15, "tpot_p50": 0.15}
"""How close the simulator is asked to be: points of adherence, and shares of the two medians."""

STEADY = 0.15
"""A median that moves by more than this between steps 5% faster and 5% slower cannot be foretold to `WITHIN`."""

_HEAD = """# How far can the simulator be believed?

The same workloads were sent to a real engine and played in the simulator, with the same policies and the same seeds.
**Real:** {real}; real HTTP, the gateway and the load client on the same two shared cores. **Not a GPU.**

| policy | load | | adherence | TTFT p50 s | TPOT p50 s | TTFT p50 at steps 5% faster to 5% slower |
|---|---|---|---|---|---|---|
"""

_TAIL = """
{verdict}

{requests} requests a run, Poisson; load 1 is {capacity} requests/s, what the engine completes of this workload with
32 in flight. Bounds: the paper's table for Llama-3.1-8B times {scale:g}. Output lengths are known to both sides, and
policies believe the profile's step times on both, throughout. In brackets: how far off the simulator is, in points of
adherence and in per cent of the medians. The profile was learnt as `cpu-smollm2` was ([profiles](../profiles.md)), from
other workloads, served just before by the same engine through the same gateway. Held-out steps: {quality}.

*As learnt* is the simulator under that profile. But the machine, which others use too, does not keep its speed: what a
run's own steps took, over what the profile says of them, is in the second line (median). *At its speed* is the
simulator under the profile times that number: what remains is what the simulator itself gets wrong.

**What the simulator needed:** the gateway and the client share the cores with the engine, so the profile must be learnt
with them at work. The gateway reacts to a step only when the next has begun. Both sides must believe the same step
times: a policy that holds requests back lets them in when an estimate falls below a threshold, and a first token waits
for that moment.

**What cannot be had:** the last column is how far the simulated median moves between a machine 5% faster and one 5%
slower. Past its capacity a policy that holds requests back is that sensitive, and no prediction of its median wait can
be closer than the machine is steady. An earlier session (bounds times 4, each side learning step times for itself) had
adherence within 5 points in 6 of 6, TPOT within 10%, and the TTFT p50 of `scorpio` off by 17% at load 0.5, 44% at load
1 and 69% at load 2, where steps 2% faster or slower move it by a factor of two.

```
python -m benchmarks.live.fidelity --requests {requests} --seed {seed} {loads} --json > docs/results/fidelity.json
python -m benchmarks.live.fidelity_page docs/results/fidelity.json
```
"""


def page(found: dict[str, Any]) -> str:
    """The page for a document of `benchmarks.live.fidelity`."""
    rows = []
    for pair in found["pairs"]:
        at = f"{pair['load']:g} ({pair['qps']:.2f}/s)"
        rows.append(f"| `{pair['policy']}` | {at} | real | {_cells(pair['real'])} | |")
        rows.append(f"| | | as learnt | {_cells(pair['simulated'], off=True)} | {pair['ttft_p50_spread']:.0%} |")
        rows.append(f"| | times {pair['drift']:.2f} | at its speed | {_cells(pair['at_speed'], off=True)} | |")
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
        loads=" ".join(f"--load {load:g}" for load in dict.fromkeys(pair["load"] for pair in found["pairs"])),
    )
    return _HEAD.format(real=found["real"]) + "\n".join(rows) + "\n" + tail


def _cells(figures: dict[str, Any], off: bool = False) -> str:
    cells = [f"{figures['slo_adherence']:.3f}", f"{figures['ttft_p50_s']:.3f}", f"{figures['tpot_p50_s']:.4f}"]
    if off:
        apart = (
            f"{figures['adherence_off'] * 100:+.1f}",
            f"{figures['ttft_p50_off']:+.0%}",
            f"{figures['tpot_p50_off']:+.0%}",
        )
        cells = [f"{cell} ({much})" for cell, much in zip(cells, apart, strict=True)]
    return " | ".join(cells)


def verdict(pairs: list[dict[str, Any]]) -> str:
    """How many runs are within what is asked: as learnt, at their own speed, and where that can be had."""
    steady = [pair for pair in pairs if pair["ttft_p50_spread"] <= STEADY]
    at_speed = _within(pair["at_speed"] for pair in steady)
    return (
        f"Within 5 points of adherence and 15% of both medians: **{_within(p['simulated'] for p in pairs)} of "
        f"{len(pairs)}** runs as learnt, **{_within(p['at_speed'] for p in pairs)} of {len(pairs)}** at their own "
        f"speed. Of the {len(steady)} whose median moves by at most 15% over the last column's range, **{at_speed}**."
    )


def _within(figures: Iterable[dict[str, Any]]) -> int:
    return sum(all(abs(each[f"{key}_off"]) <= most for key, most in WITHIN.items()) for each in figures)


def main(file: Annotated[Path, typer.Argument(help="The JSON of `benchmarks.live.fidelity`.")]) -> None:
    """Write the page beside ``file``."""
    file.with_suffix(".md").write_text(page(json.loads(file.read_text(encoding="utf-8"))), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
