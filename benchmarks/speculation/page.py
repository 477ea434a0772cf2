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
- *Steady state*: the largest gain in a steady state of equal decodes, prompts included, without queues or variation,
with the best number of drafts. Steps may take {1000 * PACE_S:g} ms for each token that a decode brings. Gains beyond it
come from different paces and from bursts.

{losses(found["profiles"])}

On the H200, chosen drafts at an acceptance of 0.6 gain 1.11x, which is the gain of the steady state. Its 256 slots are
full and decode in 13 ms, so no pace is tight. One draft for each takes 18 ms and brings 1.6 times the tokens: 1.18x
the tokens per second, of which prompts leave 1.11x. On the A100, paces are tight: without drafts, `slack` stays below
the steady state, and drafts gain more than it.

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
    for key, digits in _AT_2S:
        figures[f"{_NAMES[key]} at 2 S"] = round(fmean(run[key] for run in case["runs"]), digits)
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
                *(f"{fmean(run[key] for run in case['runs']):.{digits}f}" for key, digits in _AT_2S),
            ]
        )
    yield table([*heads, "goodput at 2 S", "adherence at 2 S"], rows)
    gains = ", ".join(f"{each['gain']:.2f}x at {each['acceptance']:g}" for each in part["bounds"]["gains"])
    yield wrapped(f"Steady state, by acceptance: {gains}.")


_AT_2S = (("goodput", 1), ("slo_adherence", 3))
_NAMES = {"goodput": "goodput", "slo_adherence": "adherence"}
