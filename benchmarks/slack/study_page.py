"""Writes docs/results/slack_study.md from the JSON of `benchmarks.slack.study`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, median, stdev
from typing import Any

from benchmarks.markdown import table, wrapped
from benchmarks.slack.ablation import BEST_EFFORT_PREEMPTION, E2E_PACE_FACTOR, FULL, MIN_ADMISSION_SHARE, REMOVALS
from benchmarks.slack.best_effort_load import (
    BATCH,
    BATCH_OUTPUT,
    BATCH_PROMPT,
    DOCUMENT_OUTPUT,
    DOCUMENT_PROMPT,
    LEAD_S,
    NONE,
)
from benchmarks.slack.trials import ABLATION_SETTINGS, BASE, CODE_CHAT, LEVELS, OVERLOADS, PARTS
from gateway.policies.slack.policy import Slack

Record = dict[str, Any]

ALL = "all requests"
"""The group of all requests."""


def page(document: Mapping[str, Any]) -> str:
    """Return the page in Markdown, with a section for each part that ``document`` has."""
    parts = {name: records for name, records in document["parts"].items() if records}
    seeds, duration_s = document["seeds"], document["duration_s"]
    chosen = "" if parts.keys() == PARTS.keys() else "".join(f" --part {name}" for name in parts)
    names = ", ".join(map(str, seeds))
    head = f"""# `slack`: ablation and sensitivity

**Simulated.** {duration_s:g} s of arrivals; seeds {names}. Predictions have the errors of the shipped model, unless a
section says otherwise. The setting is `{BASE}` of [policies.md](policies.md): one A100 with Llama-3.1-8B, ShareGPT
lengths, Poisson arrivals and the six SLO classes of the SCORPIO paper. Only the ablation also has other settings.

- *S*: the highest rate at which stock vLLM keeps 90% adherence, here {document["stock_qps"][BASE]:g} requests/s.
- *Goodput*: attained requests per second, drain included. *Adherence*: the share of all requests that attain their SLO.
- Numbers are means over the seeds, with the standard deviation in parentheses.

```
python -m benchmarks.slack.study{chosen} --seeds {len(seeds)} --duration {duration_s:g} \\
    --json docs/results/slack_study.json
python -m benchmarks.slack.study --page docs/results/slack_study.json
```"""
    sections = [wrapped(head)]
    if "ablation" in parts or "capacity" in parts:
        sections.append(_over_settings(parts.get("ablation", ()), parts.get("capacity", ())))
    sections += [wrapped(write(parts[name])) for name, write in _SECTIONS.items() if name in parts]
    return "\n\n".join(sections) + "\n"


def _over_settings(trials: Sequence[Record], searches: Sequence[Record]) -> str:
    """Return the table of each component over all settings, and the capacities of complete `slack`."""
    measures: dict[str, tuple[list[Record], str]] = {}
    for load in OVERLOADS:
        at_load = [r for r in trials if r["load"] == load and r["setting"] in ABLATION_SETTINGS and not r["condition"]]
        measures[f"goodput at {load:g} S"] = at_load, "goodput"
    for level in LEVELS:
        measures[f"capacity at {level:.0%}"] = [r for r in searches if r["adherence"] == level], "capacity"
    measures = {name: measure for name, measure in measures.items() if measure[0]}
    rows = [
        [name, removal.effect, *(_spread(records, key, name) for records, key in measures.values())]
        for name, removal in REMOVALS.items()
        if name != FULL and not removal.needs
    ]
    settings = {r["setting"] for records, _ in measures.values() for r in records}
    text = f"""## Ablation over all settings

Each row removes one component. A cell has the ratio of `slack` without it to complete `slack`, over {len(settings)}
settings of [policies.md](policies.md): the median, the range, and the setting with the lowest ratio. Below 1, the
component improves `slack`. *Capacity* is the highest rate at which the adherence is 90% or 99%.

`{MIN_ADMISSION_SHARE}` is for fairness and not for goodput, and *hold* saves decisions. `{E2E_PACE_FACTOR}` and
*{BEST_EFFORT_PREEMPTION}* are missing here, because they need end-to-end bounds or best-effort requests; later sections
measure them."""
    body = [wrapped(text), table(["without", "effect", *measures], rows)]
    if searches:
        body += [wrapped("Capacity of complete `slack`, in requests/s:"), _capacities(searches)]
    return "\n\n".join(body)


def _spread(records: Sequence[Record], key: str, row: str) -> str:
    """Return a cell: the median, lowest and highest ratio over the settings, and the setting of the lowest one."""
    ratios = {}
    for setting in _names(records, "setting"):
        values, full = (_values(records, key, setting=setting, row=name) for name in (row, FULL))
        if values and full and fmean(full):
            ratios[setting] = fmean(values) / fmean(full)
    if not ratios:
        return "-"
    worst = min(ratios, key=lambda setting: ratios[setting])
    low, high = ratios[worst], max(ratios.values())
    named = f"; {worst}" if low < 0.995 and len(ratios) > 1 else ""
    return f"**{median(ratios.values()):.2f}** ({low:.2f} to {high:.2f}{named})"


def _capacities(searches: Sequence[Record]) -> str:
    rows = []
    for setting in _names(searches, "setting"):
        found = [_values(searches, "capacity", setting=setting, row=FULL, adherence=level) for level in LEVELS]
        rows.append([setting, *(f"{values[0]:.2f}" if values else "-" for values in found)])
    return table(["setting", *(f"at {level:.0%} adherence" for level in LEVELS)], rows)


def _ablation(records: Sequence[Record]) -> str:
    """Return a table for each load of the base setting, and for each other condition."""
    parts = [
        "## Ablation in detail",
        "*Relative* is the goodput over that of complete `slack` with the same seed.",
    ]
    for setting, condition, load in dict.fromkeys((r["setting"], r["condition"], r["load"]) for r in records):
        if setting in ABLATION_SETTINGS and setting != BASE and load in OVERLOADS:
            continue  # summarized by `_over_settings`
        here = [r for r in records if (r["setting"], r["condition"], r["load"]) == (setting, condition, load)]
        where = "" if setting == BASE else f"{setting}" + (" (code with end-to-end bounds)" * (setting == CODE_CHAT))
        parts.append("### " + ", ".join(filter(None, [f"{load:g} S", where, condition])))
        full = _values(here, "goodput", row=FULL)
        rows = []
        for row in _names(here, "row"):
            goodput = _values(here, "goodput", row=row)
            ratios = [_ratio(a, b) for a, b in zip(goodput, full, strict=True)]
            adherence, preemptions = (_values(here, key, row=row) for key in ("slo_adherence", "preemptions"))
            cells = [_cell(goodput, 1), _cell(ratios, 2), _cell(adherence, 3), _cell(preemptions, 0)]
            rows.append([row, REMOVALS[row].effect, *cells])
        parts.append(table(["without", "effect", "goodput", "relative", "adherence", "preemptions"], rows))
    return "\n\n".join(parts)


def _tenants(records: Sequence[Record]) -> str:
    """Return admission rates of classes and tenants with and without `min_admission_share`, and what it costs."""
    share = Slack().min_admission_share
    parts = [
        "## Fair shares under overload",
        f"""There are three tenants. The *expensive* one has the tenth of all requests with the most tokens, prompt and
        predicted output. The *medium* one has the larger half of the others. The *cheap* one has the rest. The column
        *relative* is the admission rate of a group over that of all requests. `{MIN_ADMISSION_SHARE}`
        puts classes and tenants below {share:g} of that rate first. Measured before tenants got
        [max-min shares](../isolation.md), which decide between tenants today.""",
    ]
    for load in _names(records, "load"):
        runs = [[r for r in records if (r["row"], r["load"]) == (row, load)] for row in (FULL, MIN_ADMISSION_SHARE)]
        if not all(runs):
            continue
        groups = sorted(runs[0][0]["groups"], key=lambda name: name != ALL)
        heads = ["group", "admitted", "relative", "adherence", "without: admitted", "relative", "adherence"]
        rows = [[group, *_admission(runs[0], group), *_admission(runs[1], group)] for group in groups]
        least = [min(_relative(run, group) for run in each for group in groups) for each in runs]
        goodput = [_values(each, "goodput") for each in runs]
        costs = [100 - 100 * _ratio(a, b) for a, b in zip(*goodput, strict=True)]
        parts += [
            f"### With and without min_admission_share at {load:g} S",
            table(heads, rows),
            f"""The lowest relative rate of a class or tenant in any run is **{least[0]:.2f}** with
            `{MIN_ADMISSION_SHARE}` and {least[1]:.2f} without. Goodput is {_cell(goodput[0], 1)} with it and
            {_cell(goodput[1], 1)} without: it costs **{_cell(costs, 1)}%**.""",
        ]
    return "\n\n".join(parts)


def _admission(runs: Sequence[Record], group: str) -> list[str]:
    """Return three cells: the group's admission rate, the same over that of all requests, its adherence."""
    of_group = [run["groups"][group] for run in runs]
    admitted, attained = ([values[key] for values in of_group] for key in ("admitted", "attained"))
    return [_cell(values, 2) for values in (admitted, [_relative(run, group) for run in runs], attained)]


def _relative(run: Record, group: str) -> float:
    """Return the group's admission rate over that of all requests."""
    return _ratio(run["groups"][group]["admitted"], run["groups"][ALL]["admitted"])


def _mis_prediction(records: Sequence[Record]) -> str:
    text = """## Mis-predicted output lengths

In *reverse order*, the request with the longest answer gets the shortest prediction, and so on."""
    return f"{text}\n\n{_beside_scorpio(records, 'predicted lengths')}"


def _mis_calibration(records: Sequence[Record]) -> str:
    text = """## Mis-calibrated step times

The policy starts with step times that are a multiple of the true ones, and learns from the steps of the run or does
not. The product always learns; without learning, nothing corrects the error. The gate inside the engine starts without
a model and always learns."""
    return f"{text}\n\n{_beside_scorpio(records, 'step times', separate='not learning')}"


def _step_jitter(records: Sequence[Record]) -> str:
    text = """## Step jitter

Standard deviations relative to the expected step time: from step to step, and of a drift that lasts about 40 steps. The
mean stays the same. This engine is sensitive to jitter: from 129 to 160 tokens its steps grow from 21 to 28 ms, and
hardly any more after that. So with a pace of 30 ms a few percent decide whether a step has 130 or 270 tokens."""
    return f"{text}\n\n{_beside_scorpio(records, 'jitter')}"


def _beside_scorpio(records: Sequence[Record], error: str, separate: str = "") -> str:
    """Return a row for each load and error: each column's goodput and adherence, and `slack` over the better SCORPIO.

    The first row of a load has no error; `slack` is also compared with itself there. The lowest ratio is reported, and
    apart from it the lowest one of the rows that have ``separate`` in their name.
    """
    names, columns = _names(records, "row"), _names(records, "column")
    rows = []
    lowest: dict[bool, tuple[float, str, float]] = {}
    for load in _names(records, "load"):
        without_error = _values(records, "goodput", load=load, row=names[0], column="slack")
        for row in names:
            goodput = {column: _values(records, "goodput", load=load, row=row, column=column) for column in columns}
            adherence = (_values(records, "slo_adherence", load=load, row=row, column=column) for column in columns)
            best = max(fmean(values) for column, values in goodput.items() if column != "slack")
            ratio = _ratio(fmean(goodput["slack"]), best)
            group = bool(separate) and separate in row
            lowest[group] = min(lowest.get(group, (math.inf, "", 0.0)), (ratio, row, load))
            kept = [_ratio(a, b) for a, b in zip(goodput["slack"], without_error, strict=True)]
            cells = [f"{_cell(goodput[c], 1)}, {fmean(a):.2f}" for c, a in zip(columns, adherence, strict=True)]
            rows.append([f"{load:g} S", row, *cells, _cell(kept, 2), f"{ratio:.2f}"])
    ratios = ["`slack` over itself without error", "`slack` over the better SCORPIO"]
    heads = ["load", error, *(f"`{column}`" for column in columns), *ratios]
    found = [
        f"{separate + ': ' if group else ''}**{ratio:.2f}** ({row}, {load:g} S)"
        for group, (ratio, row, load) in sorted(lowest.items())
    ]
    summary = f"The lowest ratio of `slack` to the better SCORPIO: {'; '.join(found)}."
    return f"A policy's cell has its goodput and adherence.\n\n{table(heads, rows)}\n\n{summary}"


def _best_effort_load(records: Sequence[Record]) -> str:
    """Return the adherence of a workload beside best-effort requests, and when these were done."""
    text = f"""## Beside best-effort requests

The other load arrives {LEAD_S:g} s before the workload and runs alone until then; documents arrive with the workload.

- *Batch requests*: {BATCH:,} at once, without bounds, of {BATCH_PROMPT} prompt and {BATCH_OUTPUT:,} output tokens each.
- *Documents*: {DOCUMENT_PROMPT:,} prompt and {DOCUMENT_OUTPUT} output tokens, without bounds, for a minute.
- *Burst*: requests like those of the workload. Late ones are rejected, or served as best-effort requests.

A cell has the adherence of the workload alone, and in parentheses when the last request of the other load finished.
The simulator has no prefix cache: a preempted request is computed again from its beginning."""
    columns = _names(records, "column")
    rows, most_lost = [], -math.inf
    for load in _names(records, "load"):
        alone = _values(records, "slo_adherence", load=load, row=NONE, column="slack")
        for row in _names(records, "row"):
            here = [r for r in records if (r["load"], r["row"]) == (load, row)]
            rows.append([f"{load:g} S", row, *(_adherence_and_end(here, column) for column in columns)])
            beside = _values(here, "slo_adherence", column="slack")
            most_lost = max(most_lost, *(a - b for a, b in zip(alone, beside, strict=True)))
    heads = ["load", "earlier load", *(f"`slack`{c[5:]}" if c.startswith("slack") else f"`{c}`" for c in columns)]
    lost = f"The most adherence that `slack` loses to the earlier load in any run: **{most_lost:.3f}**."
    return f"{text}\n\n{table(heads, rows)}\n\n{lost}"


def _adherence_and_end(records: Sequence[Record], column: str) -> str:
    done = [r["background_done_s"] for r in records if r["column"] == column and "background_done_s" in r]
    end = f" ({fmean(done):.0f} s)" if done else ""
    return f"{fmean(_values(records, 'slo_adherence', column=column)):.3f}{end}"


_SECTIONS: dict[str, Callable[[Sequence[Record]], str]] = {
    "ablation": _ablation,
    "tenants": _tenants,
    "mis-prediction": _mis_prediction,
    "mis-calibration": _mis_calibration,
    "step-jitter": _step_jitter,
    "best-effort-load": _best_effort_load,
}
"""The function that writes the section of each part; `_over_settings` has the capacities."""


def _names(records: Sequence[Record], key: str) -> list[Any]:
    return list(dict.fromkeys(record[key] for record in records))


def _values(records: Sequence[Record], key: str, **fields: Any) -> list[float]:
    """Return ``key`` of the records with these fields, in the order of seeds."""
    found = [record for record in records if all(record[name] == value for name, value in fields.items())]
    return [record[key] for record in sorted(found, key=lambda record: record.get("seed", 0))]


def _ratio(value: float, of: float) -> float:
    return value / of if of else math.nan


def _cell(values: Sequence[float], digits: int) -> str:
    return f"{fmean(values):.{digits}f}" + (f" ({stdev(values):.{digits}f})" if len(values) > 1 else "")
