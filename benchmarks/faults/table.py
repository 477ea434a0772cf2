"""Every fault, injected several times into a gateway process with each kind of engine, and 20,000 mutated requests.

    python -m benchmarks.faults.table --json > docs/results/faults.json
    python -m benchmarks.faults.table --page docs/results/faults.json

The table says what was done, how often, what clients saw, how long the gateway took to recover, and what was left.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping
from statistics import median
from typing import Annotated, Any

import typer

from benchmarks.command import AsJson, PageOf, chosen, print_results, write_page
from benchmarks.faults import mutations
from benchmarks.faults.client_faults import CLIENT_FAULTS
from benchmarks.faults.fault import Fault, Result, measure
from benchmarks.faults.operator_faults import OPERATOR_FAULTS
from benchmarks.faults.process_faults import PROCESS_FAULTS
from benchmarks.faults.rig import KINDS
from benchmarks.markdown import table, wrapped

FAULTS: tuple[Fault, ...] = (*PROCESS_FAULTS, *CLIENT_FAULTS, *OPERATOR_FAULTS)


def record(result: Result) -> dict[str, Any]:
    """Return the record of one fault on one kind of engine."""
    return {
        "fault": result.fault.name,
        "done": result.fault.done,
        "engine": result.kind,
        "rounds": result.rounds,
        "seen": dict(result.seen.most_common()),
        "abusive": dict(result.abusive.most_common()),
        "recovery_s": [round(seconds, 2) for seconds in result.recovery_s],
        "lost": sum(left.lost for left in result.verdicts),
        "leaked_requests": sum(left.leaked_requests for left in result.verdicts),
        "leaked_descriptors": sum(left.leaked_descriptors for left in result.verdicts),
        "memory_mb": [left.memory_mb for left in result.verdicts],
        "problems": result.problems,
    }


def _ends(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} x {end}" for end, count in counts.items()) or "-"


def cells(row: dict[str, Any]) -> list[str]:
    """The cells of a record."""
    seconds = row["recovery_s"]
    return [
        row["fault"],
        f"`{row['engine']}`",
        str(row["rounds"]),
        _ends(row["seen"]),
        _ends(row["abusive"]),
        f"{median(seconds):.2f} ({max(seconds):.2f})",
        str(row["lost"]),
        f"{row['leaked_requests']} / {row['leaked_descriptors']}",
        f"{row['memory_mb'][-1]:+.1f}",
    ]


def mutation_cells(row: dict[str, Any]) -> list[str]:
    """The cells of the mutations of one kind of engine."""
    return [
        f"`{row['engine']}`",
        f"{row['mutations']:,}",
        ", ".join(f"{count:,} x {status}" for status, count in row["statuses"].items()),
        f"{row['longest_s']:.1f}",
        str(sum(count for status, count in row["statuses"].items() if status[0] == "5" and status != "501")),
        str(row["tracebacks"]),
        f"{row['leaked_requests']} / {row['leaked_descriptors']}",
    ]


def page(found: dict[str, Any]) -> str:
    """The page: the set-up, the commands, and the tables."""
    heads = ["fault", "engine", "times", "clients saw", "misbehaving clients saw", "recovery s", "lost", "leaked", "MB"]
    names = {row["fault"]: row["done"] for row in found["faults"]}
    mutated = ["engine", "requests", "statuses", "longest s", "5xx", "tracebacks", "leaked"]
    text = f"""# Faults

Real processes on one machine with two shared cores: `antares serve` with a simulated engine inside, or with
`kind: http` in front of a simulated server. Faults are signals, sockets, files and a full disk. Well-behaved clients
send requests all the while.

- *clients saw*: status, and the error's code, of each request of a well-behaved client.
- *recovery*: seconds from the end of the fault until a chat is served. Of a predictor: until it predicts, its
  start included. Median (longest).
- *lost*: requests without an answer, or whose outcome in the ledger is not what their client saw.
- *leaked*: requests without an outcome / descriptors that stay open.
- *MB*: growth of resident memory in the last round.

```
python -m benchmarks.faults.table --json > docs/results/faults.json
python -m benchmarks.faults.table --page docs/results/faults.json
```

{table(heads, [cells(row) for row in found["faults"]])}

## What was done

{table(["fault", "each time"], [[name, done] for name, done in names.items()])}

## Mutated requests

Valid bodies and heads of five routes with one to three mutations each: types, numbers, nesting, encodings, duplicate
keys, header lines, chunks and lengths. Seed {found["seed"]}. 501 is the answer to an unknown transfer coding. 404
includes `/v1/embeddings`, which simulated engines do not have.

```
python -m benchmarks.faults.mutations --seed {found["seed"]} --count {found["mutations"][0]["mutations"]}
```

{table(mutated, [mutation_cells(row) for row in found["mutations"]])}

[What happens when a part fails](../faults.md). [Failover between two engines](failover.md).
"""
    return wrapped(text) + "\n"


def main(
    rounds: Annotated[int, typer.Option(min=1, help="Times that each fault is injected.")] = 3,
    mutated: Annotated[int, typer.Option("--mutations", min=1, help="Mutated requests for each engine.")] = 20_000,
    fault: Annotated[list[str] | None, typer.Option(help="Repeat for several. [default: all]")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the mutations.")] = 0,
    as_json: AsJson = False,
    page_of: PageOf = None,
) -> None:
    """Inject every fault. Exit code 1 if one left something behind."""
    if page_of is not None:
        write_page(page_of, page)
        return
    names, rows = chosen("--fault", fault, [each.name for each in FAULTS]), []
    for each in FAULTS:
        for kind in each.kinds if each.name in names else ():
            rows.append(record(asyncio.run(measure(each, kind, rounds))))
            sys.stderr.write(f"{rows[-1]}\n")
    mutation_rows = [asyncio.run(mutations.measure(kind, mutated, seed)) for kind in KINDS]
    found = {"seed": seed, "rounds": rounds, "faults": rows, "mutations": mutation_rows}
    print_results(found, as_json, page)
    raise typer.Exit(int(any(row["problems"] for row in rows) or any(row["mistakes"] for row in mutation_rows)))


if __name__ == "__main__":
    typer.run(main)
