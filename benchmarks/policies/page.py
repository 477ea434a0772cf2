"""Writes docs/results/policies.md from the JSON of `benchmarks.policies.table`."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, median, stdev
from typing import Any, NamedTuple

from benchmarks.markdown import table, wrapped

OVERLOAD = 1.5
"""Smallest load, in multiples of S, that the page counts as overload."""
RIVALS = ("scorpio, prefill first", "scorpio", "fcfs")
"""Policies that the last table compares with `slack` one by one."""

TUNED_RIVALS = """**The other policies are not tuned.** They run with their published settings: SCORPIO with eta 1.3,
and every policy with the token budget of the profile. A later check tuned some of them. It is simulated too, but its
runs are not in policies.json.

- SCORPIO in prefill-first mode on `a100-llama3.1-8b`, with eta 1.6 and the authors' token budget 1,024: 16.8 requests/s
at 2 S and 18.5 at 3 S. The check got 9.7 and 4.7 with the published settings.
- SCORPIO on azure-conv at 2 S, with token budget 256: 5.6 requests/s instead of 0.66. So most of the lead on this
workload comes from the token budget.

Steps have no jitter here. With 20% jitter the ratio on `a100-llama3.1-8b` at 2 S falls from 1.32 to 1.12
([slack_study.md](slack_study.md)).

[overload.md](overload.md#tuned-rivals-simulated) has the same check for the live engine."""


class Ratio(NamedTuple):
    """Mean goodput of `slack` over that of ``rival``, the best other policy in ``setting`` at ``load``."""

    setting: str
    load: float
    rival: str
    ratio: float


def page(found: dict[str, Any], all_settings: Sequence[str]) -> str:
    """The page: a summary of the ratios, one table per setting, and `slack` against single rivals.

    Args:
        found: the JSON of `benchmarks.policies.table`.
        all_settings: the settings that the command runs by default.
    """
    names = ", ".join(map(str, found["seeds"]))
    head = f"""# Policies on every profile and workload

**Simulated.** Errors of the shipped predictor, {found["duration_s"]:g} s of arrivals unless the setting says otherwise,
seeds {names}.

- *S*: the highest rate at which stock vLLM (`fcfs`) keeps {found["keeps"]:.0%} adherence, as the mean over these seeds
([other seeds](../planning.md#capacity-of-the-shipped-profiles)).
- *Goodput*: attained requests per second, drain included; mean (standard deviation) over the seeds.
- *Ratio*: mean goodput of `slack` over that of the best other policy at the same load.
- *Count bound*: no policy can exceed this adherence.
- *Worst class*: adherence of the SLO class with the lowest adherence."""
    ratios = [ratio for part in found["settings"] for ratio in ratios_of(part)]
    parts = [
        wrapped(head),
        _command(found, all_settings),
        "## Summary",
        wrapped(_summary(ratios)),
        wrapped(TUNED_RIVALS),
        *(_setting(part) for part in found["settings"]),
        _against(found["settings"]),
    ]
    return "\n\n".join(parts) + "\n"


def _command(found: dict[str, Any], all_settings: Sequence[str]) -> str:
    settings = [part["setting"] for part in found["settings"]]
    chosen = "" if settings == list(all_settings) else "".join(f' --setting "{name}"' for name in settings)
    return f"""```
python -m benchmarks.policies.table{chosen} --duration {found["duration_s"]:g} --seeds {len(found["seeds"])} --json \\
    > docs/results/policies.json
python -m benchmarks.policies.table --page docs/results/policies.json
```"""


def ratios_of(part: dict[str, Any]) -> list[Ratio]:
    """The ratio at each load of a setting, without loads at which no other policy attains anything."""
    ratios = []
    for load in loads_of(part):
        goodput = {policy: mean(part, policy, load, "goodput") for policy in _policies(part)}
        rival = max((policy for policy in goodput if policy != "slack"), key=lambda policy: goodput[policy])
        if goodput[rival]:
            ratios.append(Ratio(part["setting"], load, rival, goodput["slack"] / goodput[rival]))
    return ratios


def _summary(ratios: Sequence[Ratio]) -> str:
    """Median and range of the ratios at each load and under overload, and the rows that `slack` loses."""
    rows = [_row(f"{load:g} S", [r for r in ratios if r.load == load]) for load in sorted({r.load for r in ratios})]
    overload = [r for r in ratios if r.load >= OVERLOAD]
    extreme = max(overload, key=lambda r: r.ratio).setting
    others = [r for r in overload if r.setting != extreme]
    rows.append(_row(f"**{OVERLOAD:g} S and above**", overload))
    text = ""
    if others:
        rows.append(_row(f"{OVERLOAD:g} S and above, without {extreme}", others))
        text = f"""One setting ({extreme}) dominates the mean ratio at {OVERLOAD:g} S and above:
        {fmean(r.ratio for r in overload):.2f} with it, {fmean(r.ratio for r in others):.2f} without it. So this page
        reports medians and ranges."""
    heads = ["load", "settings", "median ratio", "range", "rows below 1"]
    lost = [r for r in ratios if r.ratio < 1]
    lines = [f"- {r.setting} at {r.load:g} S: {_percent(1 - r.ratio)} behind `{r.rival}`" for r in lost]
    losses = "`slack` loses no row." if not lost else "`slack` loses these rows (ratio below 1):"
    parts = ["`slack` over the best other policy:", table(heads, rows), text, losses, "\n".join(lines)]
    return "\n\n".join(part for part in parts if part)


def _percent(share: float) -> str:
    return "less than 0.01%" if share < 1e-4 else f"{share:.2%}"


def _row(label: str, ratios: Sequence[Ratio]) -> list[str]:
    values = [r.ratio for r in ratios]
    below = sum(value < 1 for value in values)
    return [label, str(len(values)), f"{median(values):.2f}", f"{min(values):.3f} to {max(values):.3f}", str(below)]


def _setting(part: dict[str, Any]) -> str:
    policies = _policies(part)
    ratios = {ratio.load: ratio.ratio for ratio in ratios_of(part)}
    rows = []
    for load in loads_of(part):
        cells = [_cell(_values(part, policy, load, "goodput")) for policy in policies]
        adherence, bound, worst = (
            mean(part, "slack", load, key) for key in ("slo_adherence", "count_bound", "worst_class")
        )
        ratio = f"{ratios[load]:.2f}" if load in ratios else "-"
        rows.append([f"{load:g} S", *cells, ratio, f"{adherence:.3f} ({bound:.3f}), {worst:.2f}"])
    heads = ["load", *(f"`{p}`" for p in policies), "ratio", "`slack`: adherence (count bound), worst class"]
    return f"## {part['setting']}: S = {part['stock_qps']:g}/s\n\n{table(heads, rows)}"


def _against(parts: Sequence[dict[str, Any]]) -> str:
    """Goodput of `slack` over that of single rivals, under overload."""
    rows = []
    for part in parts:
        for load in (2.0, 3.0):
            slack = mean(part, "slack", load, "goodput")
            rivals = [mean(part, rival, load, "goodput") for rival in RIVALS]
            ratios = [f"{slack / rival:.2f}" if rival else "rival at 0" for rival in rivals]
            bound = mean(part, "slack", load, "slo_adherence") / mean(part, "slack", load, "count_bound")
            rows.append([part["setting"], f"{load:g} S", *ratios, f"{bound:.3f}"])
    heads = ["setting", "load", *(f"over `{rival}`" for rival in RIVALS), "adherence / count bound"]
    return f"## `slack` over single rivals, under overload\n\n{table(heads, rows)}"


def _policies(part: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(run["policy"] for run in part["runs"]))


def loads_of(part: dict[str, Any]) -> list[float]:
    """The loads of a setting, ascending."""
    return sorted({run["load"] for run in part["runs"]})


def mean(part: dict[str, Any], policy: str, load: float, key: str) -> float:
    """Mean of ``key`` over the seeds."""
    return fmean(_values(part, policy, load, key))


def _values(part: dict[str, Any], policy: str, load: float, key: str) -> list[float]:
    return [run[key] for run in part["runs"] if run["policy"] == policy and run["load"] == load]


def _cell(values: Sequence[float]) -> str:
    return f"{fmean(values):.1f}" + (f" ({stdev(values):.1f})" if len(values) > 1 else "")
