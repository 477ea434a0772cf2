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

| policy | load | adherence real / simulated (5% faster, slower) | TTFT p50 s | off | TPOT p50 s | off | drift |
|---|---|---|---|---|---|---|---|
"""

_TAIL = """
{verdict}

{requests} requests a run, Poisson; load 1 is {capacity} requests/s, what the engine completes of this workload with
32 in flight. Bounds: the paper's table for Llama-3.1-8B times {scale:g}. Output lengths are known to both sides, and
both decide by the profile's step times: what a policy learns in a run depends on the path that led there. In brackets:
what the simulator says of an engine 5% faster, and 5% slower. *Drift* is the median of what the run's own steps took
over what the profile says of them: how much the machine's speed differed from when the profile was learnt. The profile
(`cpu-smollm2`, [profiles](../profiles.md)) comes from two other workloads, served by the same engine through the same
gateway. Held-out steps: {quality}.

What it took to get there: the gateway and the client share the cores with the engine, so that the profile must be
learnt with them at work; the gateway reacts to a step only when the next has begun (`--apart`); and a policy that
learns while it serves takes a path of its own on each side. What no profile has is the drift: under `scorpio` a request
waits until a threshold lets it in, and 5% of speed move that moment by seconds.

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
        near = pair["simulated_at_5_percent"]
        rows.append(
            f"| `{pair['policy']}` | {pair['load']:g} ({pair['qps']:.2f}/s) "
            f"| {_both(real, simulated, near, 'slo_adherence', 2)} "
            f"| {_both(real, simulated, near, 'ttft_p50_s', 3)} | {pair['ttft_p50_off']:+.1%} "
            f"| {_both(real, simulated, near, 'tpot_p50_s', 4)} | {pair['tpot_p50_off']:+.1%} "
            f"| {pair['drift']:.2f} |"
        )
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


def _both(real: dict[str, Any], simulated: dict[str, Any], near: dict[str, Any], key: str, digits: int) -> str:
    faster, slower = near[key]
    return f"{real[key]:.{digits}f} / {simulated[key]:.{digits}f} ({faster:.{digits}f}, {slower:.{digits}f})"


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
