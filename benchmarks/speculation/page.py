"""The page of the study of speculative decoding."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import fmean
from typing import Any

from benchmarks.markdown import table, wrapped
from benchmarks.speculation.bound import PACE_S


def page(found: dict[str, Any]) -> str:
    """Return the result page of the study's JSON."""
    head = f"""# Speculative decoding under `slack`

**Simulated**: SCORPIO's six categories (paces of 30 and 50 ms), errors of the shipped length predictor,
{found["duration_s"]:g} s of arrivals, {found["seeds"]} seeds, {found["drafts"]} drafts per decode.

- *None*: no speculative decoding.
- *All*: each decode verifies all of its drafts, as in stock vLLM.
- *Chosen*: the step gate chooses the drafts that bring the most tokens per second
([how](../slack.md#speculative-decoding)).
- *Acceptance*: the probability that a draft is accepted if those before it are. It is an input here, and the same for
all requests. The gate learns it.
- *Drafting*: milliseconds that making drafts adds to a step. N-grams cost almost nothing, a draft model does.
- *Capacity*: the highest rate that keeps the adherence. *S*: capacity of stock vLLM (`fcfs`) without drafts, at 90%.
- *Goodput*: attained requests per second, drain included; mean over the seeds. *2 S*: offered at twice S.
- *Steady state*: equal decodes in equal steps, without queues or variation, with the best number of drafts per
decode. A step may take {1000 * PACE_S:g} ms for each token that a decode brings. *Step* and *requests/s* include the
prompts, *tokens/s of decodes* does not. Gains beyond the steady state come from different paces and from bursts.

{losses(found["profiles"])}

```
python -m benchmarks.speculation.study --json docs/results/speculation.json
python -m benchmarks.speculation.study --page docs/results/speculation.json
```"""
    return "\n\n".join([wrapped(head), *(part for each in found["profiles"] for part in _section(each))]) + "\n"


def losses(parts: list[dict[str, Any]]) -> str:
    """Return the rows in which chosen drafts are worse than none, and in what."""
    lines = []
    for part in parts:
        none = _figures(part["cases"][0])
        for case in part["cases"]:
            worse = [name for name, figure in _figures(case).items() if figure < none[name]]
            if case["drafts"] == "chosen" and worse:
                drafting = f"acceptance {case['acceptance']:g}, {case['draft_ms']:g} ms of drafting"
                lines.append(f"- {part['profile']}, {drafting}: lower {', '.join(worse)}.")
    return "\n".join(["Rows in which chosen drafts lose against none:", "", *lines]) if lines else ""


def _figures(case: dict[str, Any]) -> dict[str, float]:
    """Return the figures of a row by their names, rounded as the table shows them."""
    figures = {f"capacity at {float(target):.0%}": round(qps, 1) for target, qps in case["capacity"].items()}
    for name, (key, digits) in _AT_2S.items():
        figures[name] = round(fmean(run[key] for run in case["runs"]), digits)
    return figures


def _section(part: dict[str, Any]) -> Iterator[str]:
    yield f"## {part['profile']}: S = {part['stock_qps']:g}/s"
    none = part["cases"][0]["capacity"]
    heads = ["drafts", "acceptance", "drafting", *(f"capacity at {float(target):.0%}" for target in none)]
    rows = []
    for case in part["cases"]:
        plain = case["drafts"] == "none"
        rows.append(
            [
                case["drafts"],
                "" if plain else f"{case['acceptance']:g}",
                "" if plain else f"{case['draft_ms']:g} ms",
                *(f"{qps:.1f} ({qps / none[target]:.2f}x)" for target, qps in case["capacity"].items()),
                *(f"{fmean(run[key] for run in case['runs']):.{digits}f}" for key, digits in _AT_2S.values()),
            ]
        )
    yield table([*heads, *_AT_2S], rows)
    yield from _steady(part["steady"], none)


def _steady(steady: dict[str, Any], capacity: dict[str, float]) -> Iterator[str]:
    """Yield what limits the steady state without drafts, and a table of the steady states.

    ``capacity``: that of `slack` without drafts (1/s), by adherence.
    """
    none, slots, target = steady["best"][0], steady["slots"], max(capacity, key=float)
    limit = f"The pace of {1000 * PACE_S:g} ms" if none["decodes"] < slots else "The number of slots"
    below = capacity[target] / none["qps"]
    yield wrapped(
        f"Steady state: without drafts, {none['decodes']} of {slots} slots decode in steps of "
        f"{1000 * none['step_s']:.1f} ms and serve {none['qps']:.1f}/s. {limit} limits them. The capacity of `slack` "
        f"at {float(target):.0%} is {below:.2f} times that"
        + (", so drafts can gain more than in the steady state." if round(below, 2) < 1 else ".")
    )
    rows = []
    for each in steady["best"]:
        tokens_per_s = [state["decodes"] * state["tokens"] / state["decode_s"] for state in (each, none)]
        rows.append(
            [
                f"{each['drafts']}",
                f"{each['acceptance']:g}" if each is not none else "",
                f"{each['decodes']}",
                f"{each['tokens']:.2f}",
                f"{1000 * each['step_s']:.1f} ms",
                f"{tokens_per_s[0] / tokens_per_s[1]:.2f}x",
                f"{each['qps']:.1f} ({each['qps'] / none['qps']:.2f}x)",
            ]
        )
    counts = ("drafts per decode", "acceptance", "decodes", "tokens per decode")
    yield table([*counts, "step", "tokens/s of decodes", "requests/s"], rows)


_AT_2S = {"goodput at 2 S": ("goodput", 1), "adherence at 2 S": ("slo_adherence", 3)}
"""Columns at twice S: the field of a run, and the digits that are shown."""
