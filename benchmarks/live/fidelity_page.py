"""Writes docs/results/fidelity.md from the JSON of `benchmarks.live.fidelity`.

python -m benchmarks.live.fidelity_page docs/results/fidelity.json
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.command import write_page
from benchmarks.markdown import table, wrapped

WITHIN = {"adherence": 0.05, "ttft_p50": 0.15, "tpot_p50": 0.15}
"""Accepted error of the simulator: difference in adherence, and relative errors of the two medians."""

STEADY = 0.15
"""Largest relative move of the TTFT median, between steps 5% faster and 5% slower, of a predictable run.

A run that moves by more cannot be predicted to `WITHIN`."""

_HEADS = (
    "policy",
    "load",
    "",
    "adherence",
    "TTFT p50, s",
    "TPOT p50, s",
    "TTFT p50 spread, steps 5% faster to 5% slower",
)


def page(found: dict[str, Any]) -> str:
    """The page for the JSON of `benchmarks.live.fidelity`."""
    rows = []
    for pair in found["pairs"]:
        load = f"{pair['load']:g} ({pair['qps']:.2f}/s)"
        rows.append([f"`{pair['policy']}`", load, "real", *_cells(pair["real"]), ""])
        spread = f"{pair['ttft_p50_spread']:.0%}"
        rows.append(["", "", "as fitted", *_cells(pair["simulated"], errors=True), spread])
        rows.append(["", f"drift {pair['drift']:.2f}", "at measured speed", *_cells(pair["at_speed"], errors=True), ""])
    quality = "; ".join(
        f"{kind} R2 {value['r2']:.3f}, MAPE {value['mape']:.1%}" for kind, value in found["profile_quality"].items()
    )
    loads = " ".join(f"--load {load:g}" for load in dict.fromkeys(pair["load"] for pair in found["pairs"]))
    requests = found["pairs"][0]["requests"]
    command = f"python -m benchmarks.live.fidelity --requests {requests} --seed {found['seed']} {loads}"
    text = f"""# Accuracy of the simulator

The same workloads ran on a real engine and in the simulator, with the same policies and seeds.

- **Real:** HTTP, the gateway and the engine. The gateway and the load client share two cores with the engine.
- **Not a GPU:** {found["real"]}.

{table(_HEADS, rows)}

{verdict(found["pairs"])}

- *As fitted*: the simulator with the fitted profile.
- *Drift*: median ratio of the run's step times to those of the profile. Other load on the machine changes its speed.
- *At measured speed*: the simulator with the profile times the drift. The remaining error is the simulator's own.
- *In brackets*: error of the simulator, in points of adherence and in percent of the medians.
- *TTFT p50 spread*: how far the simulated median moves between a machine 5% faster and one 5% slower.

## Settings

{requests} Poisson requests per run. Load 1 is {found["capacity_rps"]} requests/s: the rate at which the engine
completes this workload with 32 requests in flight. SLOs are the paper's table for Llama-3.1-8B times
{found["slo_scale"]:g}. Both sides know the output lengths, and their policies use the profile's step times throughout.
The profile was fitted like `cpu-smollm2` ([profiles](../profiles.md)), just before, to other workloads served by the
same engine through the same gateway. Quality on held-out steps: {quality}.

## What an accurate simulation needs

- The profile must be fitted while the gateway and the client run, because they share the cores with the engine.
- The simulated gateway must react to a step only after the next step has begun.
- Both sides must use the same step times. A policy that delays requests admits them once an estimate falls below a
threshold, and the first token waits for that moment.

## Limits

Above load 1, a policy that delays requests is sensitive to the speed of the machine, as the last column shows. No
prediction of its median TTFT can be more accurate than the machine is steady.

An earlier session used bounds times 4, and each side learned step times for itself. Adherence was within 5 points in 6
of 6 runs, and TPOT within 10%. The TTFT p50 of `scorpio` was off by 17% at load 0.5, 44% at load 1 and 69% at load 2.
At load 2, steps 2% faster or slower change it by a factor of two.

## Reproduce

```
{command} --json > docs/results/fidelity.json
python -m benchmarks.live.fidelity_page docs/results/fidelity.json
```
"""
    return wrapped(text) + "\n"


def _cells(record: dict[str, Any], errors: bool = False) -> list[str]:
    """Adherence and both medians; with ``errors``, each with the simulator's error in brackets."""
    cells = [f"{record['slo_adherence']:.3f}", f"{record['ttft_p50_s']:.3f}", f"{record['tpot_p50_s']:.4f}"]
    if errors:
        off = (
            f"{record['adherence_off'] * 100:+.1f}",
            f"{record['ttft_p50_off']:+.0%}",
            f"{record['tpot_p50_off']:+.0%}",
        )
        cells = [f"{cell} ({error})" for cell, error in zip(cells, off, strict=True)]
    return cells


def verdict(pairs: list[dict[str, Any]]) -> str:
    """The number of runs within the accepted errors: as fitted, at measured speed, and among the predictable runs."""
    steady = [pair for pair in pairs if pair["ttft_p50_spread"] <= STEADY]
    return (
        "**Within 5 points of adherence and 15% of both medians:** "
        f"{_within(pair['simulated'] for pair in pairs)} of {len(pairs)} runs as fitted, "
        f"{_within(pair['at_speed'] for pair in pairs)} of {len(pairs)} at measured speed. "
        f"Among runs with a TTFT p50 spread of at most {STEADY:.0%}, at measured speed: "
        f"{_within(pair['at_speed'] for pair in steady)} of {len(steady)}."
    )


def _within(records: Iterable[dict[str, Any]]) -> int:
    return sum(all(abs(record[f"{key}_off"]) <= most for key, most in WITHIN.items()) for record in records)


def main(file: Annotated[Path, typer.Argument(help="JSON of benchmarks.live.fidelity.")]) -> None:
    """Write the page beside FILE."""
    write_page(file, page)


if __name__ == "__main__":
    typer.run(main)
