"""From the JSON of `benchmarks.compare_policies` to the table in docs/results and the README.

    python -m benchmarks.results_page docs/results/overload.json

Rewrites docs/results/README.md and the marked part of README.md, so that a figure in the docs is always a measured one.
"""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Annotated, Any

import typer

ROOT = Path(__file__).parents[1]
COLUMNS = {
    "goodput": "goodput, attained/s",
    "slo_adherence": "adherence",
    "rejected": "rejected",
    "ttft_violations": "late first token",
    "tpot_violations": "late tokens",
    "tpot_p50_s": "TPOT p50, s",
}


def table(result: dict[str, Any], keys: list[str]) -> str:
    """A Markdown table: one row a policy, mean over the rounds with the range."""
    lines = ["| policy | " + " | ".join(COLUMNS[key] for key in keys) + " |", "|---|" + "---|" * len(keys)]
    for policy in dict.fromkeys(run["policy"] for run in result["runs"]):
        runs = [run for run in result["runs"] if run["policy"] == policy]
        cells = []
        for key in keys:
            values = [run[key] for run in runs]
            cells.append(f"{statistics.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})")
        name = "`fcfs` (stock vLLM)" if policy == "fcfs" else f"`{policy}`"
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(file: Annotated[Path, typer.Argument(help="What compare_policies --json printed.")]) -> None:
    """Write docs/results/README.md and the results in README.md from FILE."""
    result = json.loads(file.read_text())
    runs = result["runs"]
    rounds = len({run["seed"] for run in runs})
    command = (
        f"python -m benchmarks.compare_policies --overload {result['overload']:g} --requests {runs[0]['requests']} "
        f"--repeats {rounds} --slo-scale {result['slo_scale']:g} --seed {min(run['seed'] for run in runs)} --json"
    )
    scorpio = [run for run in runs if run["policy"] == "scorpio"]
    share = statistics.mean(run["scheduling_s"] / run["duration_s"] for run in scorpio)
    offered = result["overload"] * result["capacity_rps"]
    late_ms = max(run["client_lateness_p99_s"] for run in runs) * 1000
    page = f"""# Results

Rejected and failed requests stay in the denominator of adherence. Every table says what was real.

## Twice the capacity of one real engine

**Real:** {result["real"]}, on two shared cores; real HTTP; the load client in a process of its own. **Not a GPU.**

{table(result, list(COLUMNS))}

Mean and range over {rounds} rounds of {runs[0]["requests"]} requests. One engine for the whole run; the policies take
turns in front of it, each round with a seed that both share. The SLO table is the paper's for Llama-3.1-8B times
{result["slo_scale"]:g} (the strictest bounds: {0.5 * result["slo_scale"]:g} s to the first token,
{30 * result["slo_scale"]:g} ms a token), six categories evenly. The capacity, {result["capacity_rps"]:.2f}
requests/s, is what the engine completes of the same workload with 64 requests always in flight; {offered:.2f}
requests/s were offered, Poisson. Times are measured by the client, which itself was at most {late_ms:.0f} ms late
(99th percentile, worst run).
Deciding took {share:.2%} of the run's time under `scorpio`. The predictor was off: lengths came from running
statistics, cut at each request's `max_tokens`, which here is the true length.

```
{command} > docs/results/overload.json
python -m benchmarks.results_page docs/results/overload.json
```
"""
    (ROOT / "docs" / "results" / "README.md").write_text(page)
    readme = ROOT / "README.md"
    shown = table(result, ["goodput", "slo_adherence", "rejected", "tpot_violations"])
    marked = f"<!-- results:start -->\n{shown}\n<!-- results:end -->"
    text = re.sub(
        r"<!-- results:start -->.*?<!-- results:end -->", lambda _: marked, readme.read_text(), flags=re.DOTALL
    )
    readme.write_text(text)


if __name__ == "__main__":
    typer.run(main)
