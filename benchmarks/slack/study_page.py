"""The page of `benchmarks.slack.study`: tables, and what they say in numbers. All of it comes from the JSON."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import fmean, stdev
from typing import Any

from benchmarks.slack.ablation import FULL, WITHOUT
from benchmarks.slack.best_effort_load import AHEAD_S, BATCH, BATCH_OUTPUT, BATCH_PROMPT, NOBODY

Record = dict[str, Any]

EVERYBODY = "everybody"
"""The group that all requests are in."""

_HEAD = """# `slack`, taken apart and lied to

**Simulated**: an A100 with Llama-3.1-8B, ShareGPT, the paper's six categories, {duration:g} s of Poisson arrivals, the
shipped predictor's errors but where it says otherwise; seeds {seeds}. *Goodput* is attained requests a second, drain
included, *adherence* attained over all requests. Numbers are means over the seeds, standard deviations in brackets.
*S* is what stock vLLM bears with 90% adherence: {stock:g}/s.

```
python -m benchmarks.slack.study{parts} --seeds {count} --duration {duration:g} --stock-qps {stock:g} \\
    --json docs/results/slack_study.json
python -m benchmarks.slack.study --page docs/results/slack_study.json
```
"""


def page(found: dict[str, Any]) -> str:
    """The page in Markdown, of the parts that ``found`` has."""
    parts = found["parts"]
    chosen = "" if parts.keys() == _WRITERS.keys() else "".join(f" --part {name}" for name in parts)
    seeds = ", ".join(map(str, found["seeds"]))
    head = _HEAD.format(
        duration=found["duration_s"], seeds=seeds, stock=found["stock_qps"], count=len(found["seeds"]), parts=chosen
    )
    return "\n".join([head, *("\n".join(_WRITERS[name](records)) + "\n" for name, records in parts.items())])


def ablation(records: Sequence[Record]) -> list[str]:
    """A table a load, and those of other circumstances."""
    lines = [
        "## Without one of its parts",
        "",
        "*Of full* is the goodput over that of `slack` in full with the same seed: below 1, the part earns its place.",
        "The floor is not there for goodput but for those it serves, below, and standing for fewer decisions. Memory",
        "is short, prompts are long for their answers, requests are bounded end to end, and paces are all but the",
        "engine's own, in the last tables only.",
    ]
    for load, where in dict.fromkeys((r["load"], r.get("where", "")) for r in records):
        here = [r for r in records if (r["load"], r.get("where", "")) == (load, where)]
        lines += ["", f"### {load:g} S{', ' if where else ''}{where}", ""]
        lines += _header("without", "which means", "goodput", "of full", "adherence", "preemptions")
        full = _of(here, "goodput", row=FULL)
        for row in _names(here, "row"):
            goodput = _of(here, "goodput", row=row)
            ratios = [_ratio(a, b) for a, b in zip(goodput, full, strict=True)]
            cells = (
                _cell(goodput, 1),
                _cell(ratios, 2),
                _cell(_of(here, "slo_adherence", row=row), 3),
                _cell(_of(here, "preemptions", row=row), 0),
            )
            lines.append(f"| {row} | {WITHOUT[row].says} | " + " | ".join(cells) + " |")
    return lines


def tenants(records: Sequence[Record]) -> list[str]:
    """Whom the floor serves, and what it costs."""
    lines = [
        "## Whom it serves when not all can be",
        "",
        "Three tenants: the tenth of all requests with the most tokens (prompt and predicted answer) is the dear",
        "one's, the larger half of the others the middling one's, the rest the cheap one's. *Of all* is a group's rate",
        "of admission over everybody's; of that the floor promises 0.5 to every class and tenant.",
    ]
    for load in _names(records, "load"):
        on, off = (
            [r for r in records if (r["row"], r["load"]) == (row, load)] for row in (FULL, "min_admission_share")
        )
        lines += ["", f"### {load:g} S", ""]
        lines += _header("group", "admitted", "of all", "adherence", "no floor: admitted", "of all", "adherence")
        groups = sorted(on[0]["groups"], key=lambda name: name != EVERYBODY)
        lines += [f"| {group} | {_served(on, group)} | {_served(off, group)} |" for group in groups]
        least = [min(_of_all(run, group) for run in runs for group in groups) for runs in (on, off)]
        goodput = [_of(runs, "goodput") for runs in (on, off)]
        costs = [100 - 100 * _ratio(a, b) for a, b in zip(*goodput, strict=True)]
        lines += [
            "",
            f"The least of all that any class or tenant had in any run: **{least[0]:.2f}** with the floor,",
            f"{least[1]:.2f} without. Goodput is {_cell(goodput[0], 1)} with it and {_cell(goodput[1], 1)} without: it",
            f"costs **{_cell(costs, 1)}%**.",
        ]
    return lines


def _served(runs: Sequence[Record], group: str) -> str:
    """Three cells: the group's admission rate, the same over everybody's, its adherence."""
    of_group = [run["groups"][group] for run in runs]
    shares = (
        [of["admitted"] for of in of_group],
        [_of_all(run, group) for run in runs],
        [of["attained"] for of in of_group],
    )
    return " | ".join(_cell(values, 2) for values in shares)


def predictors(records: Sequence[Record]) -> list[str]:
    """Wrong output lengths."""
    return [
        "## Told wrong output lengths",
        "",
        "*Reverse order*: whose answer is the longest is told the shortest, and so on.",
        "",
        *_beside_scorpio(records, "lengths are"),
    ]


def step_times(records: Sequence[Record]) -> list[str]:
    """Wrong step times."""
    return [
        "## Told wrong step times",
        "",
        "What the policy believes of step times, as a multiple of the true ones, with and without learning from the",
        "steps of the run. The product always learns; *never* is the harder question, of what a wrong belief costs",
        "that nothing corrects. The gate inside the engine knows nothing at first, and learns in either case.",
        "",
        *_beside_scorpio(records, "step times are", apart="never learning"),
    ]


def step_jitter(records: Sequence[Record]) -> list[str]:
    """Steps that vary."""
    return [
        "## With steps that vary",
        "",
        "Standard deviations of what a step takes over what is to be expected: from step to step, and of a drift that",
        "lasts for some 40 steps; the mean stays. This engine is a hard one for it: from 129 to 160 tokens its steps",
        "grow from 21 to 28 ms and then hardly any more, so that with a pace of 30 ms a few percent decide whether a",
        "step holds 130 tokens or 270.",
        "",
        *_beside_scorpio(records, "steps vary by"),
    ]


def crowds(records: Sequence[Record]) -> list[str]:
    """What requests cost that nobody insists on."""
    lines = [
        "## Beside requests that nobody insists on",
        "",
        f"They come {AHEAD_S:g} s earlier and have the engine to themselves: {BATCH:,} batch requests at once, of",
        f"{BATCH_PROMPT} prompt tokens and {BATCH_OUTPUT:,} of output each, without bounds; or a burst of the",
        "workload's own kind, of which those are served at best effort that cannot be on time. Adherence is of the",
        "others alone; in brackets when the last of the crowd was through. The simulator has no prefix cache: whoever",
        "made way is computed again from the beginning.",
        "",
    ]
    columns, loads = _names(records, "column"), _names(records, "load")
    lines += _header("load", "beside", *(f"`{name}`" if " " not in name else f"`slack`{name[5:]}" for name in columns))
    least = math.inf
    for load in loads:
        for row in _names(records, "row"):
            cells = []
            for column in columns:
                here = [r for r in records if (r["load"], r["row"], r["column"]) == (load, row, column)]
                done = f" ({fmean(r['crowd_done_s'] for r in here):.0f} s)" if "crowd_done_s" in here[0] else ""
                cells.append(f"{fmean(r['slo_adherence'] for r in here):.3f}{done}")
            lines.append(f"| {load:g} S | {row} | " + " | ".join(cells) + " |")
            own, alone = (_of(records, "slo_adherence", load=load, row=name, column="slack") for name in (row, NOBODY))
            least = min(least, *(a - b for a, b in zip(own, alone, strict=True)))
    return [*lines, "", f"The most that `slack` lost by a crowd, in any run: **{-least:.3f}** of adherence."]


_WRITERS: dict[str, Callable[[Sequence[Record]], list[str]]] = {
    "ablation": ablation,
    "tenants": tenants,
    "predictors": predictors,
    "step-times": step_times,
    "step_jitter": step_jitter,
    "crowds": crowds,
}
"""What writes each part."""


def _beside_scorpio(records: Sequence[Record], what: str, apart: str = "") -> list[str]:
    """A line a load and error: every policy's goodput and adherence, and `slack` over the better SCORPIO.

    The first row of a load is the one without an error; *of right* is `slack`'s goodput over that there. The worst of
    the rows that have ``apart`` in their name is told apart from the worst of the others.
    """
    rows, columns = _names(records, "row"), _names(records, "column")
    lines = _header("load", what, *(f"`{name}`" for name in columns), "`slack` of right", "over the better SCORPIO")
    least: dict[bool, tuple[float, str, float]] = {}
    for load in _names(records, "load"):
        right = _of(records, "goodput", load=load, row=rows[0], column="slack")
        for row in rows:
            goodput = {name: _of(records, "goodput", load=load, row=row, column=name) for name in columns}
            adherence = {name: _of(records, "slo_adherence", load=load, row=row, column=name) for name in columns}
            best = max(fmean(values) for name, values in goodput.items() if name != "slack")
            ratio = _ratio(fmean(goodput["slack"]), best)
            told_apart = bool(apart) and apart in row
            least[told_apart] = min(least.get(told_apart, (math.inf, "", 0.0)), (ratio, row, load))
            cells = [f"{_cell(goodput[name], 1)}, {fmean(adherence[name]):.2f}" for name in columns]
            kept = _cell([_ratio(a, b) for a, b in zip(goodput["slack"], right, strict=True)], 2)
            lines.append(f"| {load:g} S | {row} | " + " | ".join(cells) + f" | {kept} | {ratio:.2f} |")
    worst = [
        f"{apart + ': ' if told_apart else ''}**{ratio:.2f}** ({row}, {load:g} S)"
        for told_apart, (ratio, row, load) in sorted(least.items())
    ]
    return [*lines, "", f"Goodput and adherence. The least of `slack` over the better SCORPIO: {'; '.join(worst)}."]


def _header(*heads: str) -> list[str]:
    return ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]


def _names(records: Sequence[Record], key: str) -> list[Any]:
    return list(dict.fromkeys(record[key] for record in records))


def _of(records: Sequence[Record], key: str, **where: Any) -> list[float]:
    """``key`` of those records where everything holds, in the order of seeds."""
    found = [record for record in records if all(record[name] == value for name, value in where.items())]
    return [record[key] for record in sorted(found, key=lambda record: record["seed"])]


def _of_all(record: Record, group: str) -> float:
    """The group's admission rate over everybody's."""
    return _ratio(record["groups"][group]["admitted"], record["groups"][EVERYBODY]["admitted"])


def _ratio(value: float, of: float) -> float:
    return value / of if of else float("nan")


def _cell(values: Sequence[float], digits: int) -> str:
    return f"{fmean(values):.{digits}f}" + (f" ({stdev(values):.{digits}f})" if len(values) > 1 else "")
