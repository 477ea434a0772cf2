"""From the JSON of `benchmarks.live.compare_policies` to its page in docs/results and the table in the README.

    python -m benchmarks.live.results_page docs/results/overload.json

Writes overload.md beside the JSON, and the marked parts of the index and of README.md, so that a figure in the docs is
always a measured one.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.figures.page import with_block

ROOT = Path(__file__).parents[1]
COLUMNS = {
    "goodput": "goodput, attained/s",
    "slo_adherence": "adherence",
    "rejected": "rejected",
    "ttft_violations": "late first token",
    "tpot_violations": "late tokens",
    "tpot_p50_s": "TPOT p50, s",
}


def table(result: dict[str, Any], load: float, keys: list[str]) -> str:
    """A Markdown table: one row a policy, mean over the rounds with the range."""
    lines = ["| policy | " + " | ".join(COLUMNS[key] for key in keys) + " |", "|---|" + "---|" * len(keys)]
    at_load = [run for run in result["runs"] if run["load"] == load]
    for policy in dict.fromkeys(run["policy"] for run in at_load):
        runs = [run for run in at_load if run["policy"] == policy]
        cells = []
        for key in keys:
            values = [run[key] for run in runs]
            cells.append(f"{statistics.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})")
        name = "`fcfs` (stock vLLM)" if policy == "fcfs" else f"`{policy}`"
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(file: Annotated[Path, typer.Argument(help="What compare_policies --json printed.")]) -> None:
    """Write the page beside FILE, and the results in docs/results/README.md and README.md (of the highest load)."""
    result = json.loads(file.read_text())
    runs = result["runs"]
    temperature = result.get("temperature", 1.0)
    rounds = len({run["seed"] for run in runs})
    highest = max(run["load"] for run in runs)
    shares = []
    for policy in dict.fromkeys(run["policy"] for run in runs if run["policy"] != "fcfs"):
        own = [run for run in runs if (run["policy"], run["load"]) == (policy, highest)]
        deciding, gates = (
            statistics.mean(run[what] / run["duration_s"] for run in own) for what in ("deciding_s", "gate_s")
        )
        shares.append(f"{deciding:.2%} and {gates:.2%} under `{policy}`")
    policies = "".join(f" --policy {policy}" for policy in dict.fromkeys(run["policy"] for run in runs))
    loads = sorted({run["load"] for run in runs})
    options = "".join(f" --load {load:g}" for load in loads)
    command = (
        f"python -m benchmarks.live.compare_policies{policies}{options} "
        f"--duration {result['duration_s']:g} --repeats {rounds} --slo-scale {result['slo_scale']:g} "
        f"--temperature {temperature:g} "
        f"--seed {min(run['seed'] for run in runs)} --json"
    )
    tables = "\n\n".join(
        f"## {load:g} x capacity: {load * result['capacity_rps']:.2f} requests/s offered\n\n"
        f"{table(result, load, list(COLUMNS))}"
        for load in loads
    )
    answers = "greedy" if temperature == 0 else "sampled"
    late_ms = max(run["client_lateness_p99_s"] for run in runs) * 1000
    page = f"""# One real engine, up to and past its capacity

**Real:** {result["real"]}, on two shared cores; real HTTP; the load client in a process of its own. **Not a GPU.**

{tables}

Mean and range over {rounds} rounds of {result["duration_s"]:g} s of arrivals. One engine for the whole run; the
policies take turns in front of it, each round with a seed that all share. The SLO table is the paper's for
Llama-3.1-8B times {result["slo_scale"]:g} (the strictest bounds: {0.5 * result["slo_scale"]:g} s to the first token,
{30 * result["slo_scale"]:g} ms a token), six categories evenly; answers are {answers}. The capacity,
{result["capacity_rps"]:.2f} requests/s, is what the engine completes of the same workload with 64 requests always in
flight; arrivals are Poisson.
Times are measured by the client, which itself was at most {late_ms:.0f} ms late (99th percentile, worst run).
At {highest:g} times the capacity, decisions in the gateway and gates in the engine took
{", ".join(shares)} of the time.
The predictor was off: lengths came from running statistics, cut at each request's `max_tokens`, which here is the true
length.
{result.get("note", "")}

```
{command} > docs/results/overload.json
python -m benchmarks.live.results_page docs/results/overload.json
```
"""
    file.with_suffix(".md").write_text(page, encoding="utf-8")
    shown = table(result, loads[-1], ["goodput", "slo_adherence", "rejected", "tpot_violations"])
    index, readme = file.with_name("README.md"), ROOT / "README.md"
    told = f"[One real engine]({file.with_suffix('.md').name}) at {loads[-1]:g} times its capacity:\n\n{shown}"
    for target, name, block in ((index, "overload", told), (readme, "results", shown)):
        text = with_block(target.read_text(encoding="utf-8"), name, block)
        target.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
