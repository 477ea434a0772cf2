"""Writes docs/results/overload.md, and the tables in the index and in README.md, from a live comparison.

    python -m benchmarks.live.results_page docs/results/overload.json

The JSON is that of `benchmarks.live.compare_policies`.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import markdown
from benchmarks.command import write_page
from benchmarks.markdown import policy_label, with_block, wrapped

README = Path(__file__).parents[2] / "README.md"
COLUMNS = {
    "goodput": "goodput, attained/s",
    "slo_adherence": "adherence",
    "rejected": "rejected",
    "ttft_violations": "TTFT violations",
    "tpot_violations": "TPOT violations",
    "tpot_p50_s": "TPOT p50, s",
}
SUMMARY = ("goodput", "slo_adherence", "rejected", "tpot_violations")
"""Columns of the tables in the index and in README.md."""

TUNED_RIVALS = """## Tuned rivals (simulated)

The policies above run with their published settings: SCORPIO with eta 1.3, and vLLM with a token budget of 512. A later
check tuned them on a **simulation** of this engine, at 2 times its saturation throughput. Its
runs are not in overload.json.

| policy | settings | goodput, attained/s |
|---|---|---|
| `slack` | default | 13.7 |
| `scorpio` | eta 1.3, token budget 512 (published) | 8.6 |
| `scorpio` | eta 2, or token budget 64 | 12.3 to 12.8 |
| `fcfs` (stock vLLM) | default | 0.65 |
| `fcfs` (stock vLLM) | token budget 64 to 128 | 2.5 to 2.8 |

So tuned SCORPIO reaches 0.90 to 0.93 of the goodput of `slack`, against 0.63 with its published settings. The lead of
`slack` in the live tables is a lead over untuned rivals. [policies.md](policies.md) reports a similar check on other
engines and workloads."""


def table(result: dict[str, Any], load: float, keys: list[str]) -> str:
    """A Markdown table with one row per policy: mean (range) over the rounds at ``load``."""
    at_load = [run for run in result["runs"] if run["load"] == load]
    rows = []
    for policy in dict.fromkeys(run["policy"] for run in at_load):
        cells = []
        for key in keys:
            values = [run[key] for run in at_load if run["policy"] == policy]
            cells.append(f"{statistics.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})")
        rows.append([policy_label(policy), *cells])
    return markdown.table(["policy", *(COLUMNS[key] for key in keys)], rows)


def page(result: dict[str, Any]) -> str:
    """The page: one table per load, the settings, and the note on tuned rivals."""
    runs = result["runs"]
    rounds = len({run["seed"] for run in runs})
    loads = sorted({run["load"] for run in runs})
    tables = "\n\n".join(
        f"## Load {load:g}: {load * result['capacity_rps']:.2f} requests/s offered\n\n"
        f"{table(result, load, list(COLUMNS))}"
        for load in loads
    )
    client_late_ms = max(run["client_lateness_p99_s"] for run in runs) * 1000
    text = f"""# One real engine at {loads[0]:g} to {loads[-1]:g} times its saturation throughput

- **Real:** HTTP, the gateway and the engine, on two shared cores. The load client has a process of its own.
- **Not a GPU:** {result["real"]}.
- Numbers are means (ranges) over {rounds} rounds of {result["duration_s"]:g} s of Poisson arrivals.

{tables}

## Settings

- The saturation throughput is {result["capacity_rps"]:.2f} requests/s: the rate at which the engine completes the
same workload with 64 requests always in flight. A load is a multiple of it.
- One engine serves the whole comparison. In each round all policies take turns in front of it, with the same seed.
- SLOs are the paper's table for Llama-3.1-8B times {result["slo_scale"]:g}, with its six categories in equal shares.
The strictest bounds are {0.5 * result["slo_scale"]:g} s TTFT and {30 * result["slo_scale"]:g} ms TPOT.
- Sampling is {"greedy" if result.get("temperature", 1.0) == 0 else "random"}
(temperature {result.get("temperature", 1.0):g}).
- The gateway did **not** know output lengths. The predictor was off, so a predicted length was the running median of
output lengths, cut at the request's `max_tokens`. `max_tokens` is the true length here (`ignore_eos`), so the cut makes
the predictions of short answers exact.
- The client measures the times. It sent requests at most {client_late_ms:.0f} ms late (99th percentile, worst run).
- {_scheduling_share(runs, loads[-1])}

{TUNED_RIVALS}

## Reproduce

```
{_command(result, rounds, loads)} > docs/results/overload.json
python -m benchmarks.live.results_page docs/results/overload.json
```
"""
    return wrapped(text) + "\n"


def _scheduling_share(runs: list[dict[str, Any]], load: float) -> str:
    """The share of the run time that decisions and gates took under each policy."""
    shares = []
    for policy in dict.fromkeys(run["policy"] for run in runs if run["policy"] != "fcfs"):
        own = [run for run in runs if (run["policy"], run["load"]) == (policy, load)]
        deciding, gates = (
            statistics.mean(run[key] / run["duration_s"] for run in own) for key in ("deciding_s", "gate_s")
        )
        shares.append(f"{deciding:.2%} and {gates:.2%} under `{policy}`")
    return (
        f"Share of the time that decisions (gateway) and step gates (engine) took at load {load:g}: "
        f"{'; '.join(shares)}."
    )


def _command(result: dict[str, Any], rounds: int, loads: list[float]) -> str:
    runs = result["runs"]
    policies = "".join(f" --policy {policy}" for policy in dict.fromkeys(run["policy"] for run in runs))
    return (
        f"python -m benchmarks.live.compare_policies{policies}{''.join(f' --load {load:g}' for load in loads)} "
        f"--duration {result['duration_s']:g} --repeats {rounds} --slo-scale {result['slo_scale']:g} "
        f"--temperature {result.get('temperature', 1.0):g} --seed {min(run['seed'] for run in runs)} --json"
    )


def summary(result: dict[str, Any]) -> str:
    """The table of the highest load, with what the reader must know about it."""
    rounds = len({run["seed"] for run in result["runs"]})
    highest = max(run["load"] for run in result["runs"])
    note = f"""Mean (range) of {rounds} rounds. Predicted output lengths were the gateway's running medians, cut at
    `max_tokens`. The other policies ran with their published settings. In a simulation of this engine, tuned SCORPIO
    reaches 0.90 to 0.93 of the goodput of `slack`."""
    return f"{table(result, highest, list(SUMMARY))}\n\n{wrapped(note)}"


def write_pages(file: Path, readme: Path) -> None:
    """Write the page beside ``file``, and the marked blocks of the index beside it and of ``readme``."""
    result = write_page(file, page)
    highest = max(run["load"] for run in result["runs"])
    entry = f"[One real engine]({file.stem}.md) at {highest:g} times its saturation throughput:\n\n{summary(result)}"
    for path, name, block in ((file.with_name("README.md"), "overload", entry), (readme, "results", summary(result))):
        path.write_text(with_block(path.read_text(encoding="utf-8"), name, block), encoding="utf-8")


def main(file: Annotated[Path, typer.Argument(help="JSON of benchmarks.live.compare_policies.")]) -> None:
    """Write the page beside FILE, and the tables of the highest load in docs/results/README.md and README.md."""
    write_pages(file, README)


if __name__ == "__main__":
    typer.run(main)
