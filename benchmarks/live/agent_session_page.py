"""Writes docs/results/agent_session.md from its JSON file.

python -m benchmarks.live.agent_session_page docs/results/agent_session.json
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks.command import write_page
from benchmarks.live.agent_session import adherence, prediction_errors
from benchmarks.markdown import policy_label, table, wrapped


def wrong_rejections(run: dict[str, Any], stock: dict[str, Any]) -> int:
    """Return how many requests ``run`` rejected that attained their bounds in ``stock``, at the same turn."""
    attained = {(r["agent"], r["turn"]) for r in stock["records"] if r.get("attained")}
    return sum(r["status"] == 429 and (r["agent"], r["turn"]) in attained for r in run["records"])


def rows(found: dict[str, Any]) -> list[list[str]]:
    """Return a row for each run: adherence, rejections, prefix cache, and the error of the predicted TTFT."""
    stock = {(run["agents"], run["round"]): run for run in found["runs"] if run["policy"] == "fcfs"}
    cells = []
    for run in found["runs"]:
        records, errors = run["records"], np.abs(prediction_errors(run["records"]))
        served = [r for r in records if r["status"] == 200]
        cells.append(
            [
                str(run["agents"]),
                str(run["round"] + 1),
                policy_label(run["policy"]),
                f"{adherence(records):.3f}",
                f"{len(records) - len(served)} ({wrong_rejections(run, stock[run['agents'], run['round']])} wrongly)",
                f"{sum(r['cached'] for r in served) / sum(r['prompt'] for r in served):.3f}",
                f"{np.median([r['ttft_ms'] for r in served]):,.0f}",
                f"{np.quantile(errors, 0.5):.0%} / {np.quantile(errors, 0.9):.0%}",
                f"{np.median(prediction_errors(records)):+.0%}",
            ]
        )
    return cells


def page(found: dict[str, Any]) -> str:
    """Return the page: the setup, the bounds, and the table."""
    bounds = "\n".join(
        f"- {group['agents']} at once: first turn {group['bounds']['first_ms']:,.0f} ms, then "
        f"{group['bounds']['base_ms']:,.0f} + {group['bounds']['turn_ms']:.1f} * turn ms; TPOT "
        f"{group['bounds']['tpot_ms']:,.0f} ms."
        for group in found["groups"]
    )
    last = next(r for r in found["groups"][0]["calibration"] if r["turn"] == found["turns"] - 1)
    heads = ("agents", "round", "policy", "adherence", "rejected", "hit rate", "TTFT p50, ms", "p50 / p90", "bias")
    text = f"""# Agent sessions with prefix caching on a real engine

**CPU, a real vLLM with SmolLM2-135M-Instruct.** {found["turns"]} requests per agent, {found["calls"]} tool calls,
often several at once; the last prompt has {last["prompt"]:,} tokens, of which {last["cached"]:,} are cached. Each
answer has {found["output_tokens"]} tokens. Both policies serve equal requests on the same engine and take turns. The
machine has {found["cpus"]} cores and other work runs on it.

The bounds are {found["multiple"]:g} times what stock vLLM achieved with as many agents, just before:

{bounds}

{table(heads, rows(found))}

- *wrongly*: rejected although stock vLLM attained the bounds at that turn in the same round.
- *hit rate*: share of the prompt tokens that vLLM found in its prefix cache.
- *p50 / p90*: absolute error of the predicted TTFT, relative to the measured one. *bias*: its median with sign.

```
python -m benchmarks.live.agent_session --seed {found["seed"]} --json > docs/results/agent_session.json
python -m benchmarks.live.agent_session_page docs/results/agent_session.json
```

Flags of vLLM: {found["flags"]}. The chat template renders tools and calls in Hermes' format. The simulated counterpart
is [prefix caching](prefix_caching.md).
"""
    return wrapped(text) + "\n"


def main(
    found: Annotated[Path, typer.Argument(help="JSON file of benchmarks.live.agent_session.")],
) -> None:
    """Write the page beside the JSON file."""
    write_page(found, page)


if __name__ == "__main__":
    typer.run(main)
