"""The page of the soaks."""

from __future__ import annotations

from typing import Any

from benchmarks.faults.checks import OUTCOMES
from benchmarks.markdown import table, wrapped


def page(found: dict[str, Any]) -> str:
    """The page: the set-up, the commands, and the tables."""
    heads = [
        "engine",
        "minutes",
        "engine completes",
        "offered",
        "requests",
        "longest answer",
        "lost",
        "leaked",
        "MB: start, warm, end, peak",
        "MB a minute",
        "descriptors",
    ]
    rows, ends, wrong = [], [], []
    for row in found["soaks"]:
        memory, opened = row["memory_mb"], row["descriptors"]
        rows.append(
            [
                row["engine"],
                f"{row['warm_up_min']:g} + {row['minutes']:g}",
                f"{row['saturation_per_s']:.1f}/s for {row['clients']} clients",
                f"{row['offered_per_s']:.1f}/s",
                f"{row['requests']:,}",
                f"{row['longest_s']:.0f} s",
                str(row["lost"]),
                f"{row['leaked_requests']} / {row['leaked_descriptors']}",
                ", ".join(f"{memory[key]:.0f}" for key in ("start", "warm", "end", "peak")),
                f"{row['slope_mb_per_min']:+.2f}",
                f"{opened['before']}, {opened['peak']}, {opened['after']}",
            ]
        )
        seen, faulty, faults = (
            ", ".join(f"{n:,} x {name}" for name, n in row[key].items()) for key in ("seen", "abusive", "faults")
        )
        wrong += [f"- {row['engine']}: {problem}" for problem in row["problems"]]
        ledger = ", ".join(f"{row['ledger'][name]:,} {name}" for name in ("accepted", *OUTCOMES, "open"))
        ends.append([row["engine"], seen, faulty, faults, ledger])
    commands = [
        f"python -m benchmarks.faults.soak --engine {row['engine']} --minutes {row['minutes']:g} --json > {number}.json"
        for number, row in enumerate(found["soaks"], 1)
    ]
    of = " ".join(f"--of {number}.json" for number in range(1, len(commands) + 1))
    commands.append(f"python -m benchmarks.faults.soak --page docs/results/soak.json {of}")
    text = f"""# Soak

`antares serve` gets twice the requests per second that its engine completes. 5% of the clients disconnect.
The gateway keeps 1,000 records. 400 mutated requests come first, so that whatever loads on its first use is loaded.
A random fault follows every 2 to 6 seconds:

- *kill predictor*: SIGKILL;
- *pause engine*: the engine's process stops for up to three seconds;
- *read nothing*: eight clients ask for a stream and read nothing;
- *send garbage*: 20 mutated requests;
- *reload*: the configuration is reloaded, sometimes from a broken file.

*simulated*: a simulated server behind `kind: http`. *vllm*: the real engine of `make serve`, on CPU.

- *minutes*: the warm-up and the measured time, both under the same load and faults.
- *engine completes*: best-effort requests per second for so many clients, which ask one after the other. Clients that
  fill all slots and the queue of `batch` saturate the engine: 116 with *simulated*, 70 with *vllm*.
- *offered*: requests per second of the load, which does not wait for answers. The three classes have equal parts and
  the same output lengths, 10 to 70 tokens.
- *longest answer*: of a request that got one. Best-effort requests of `batch` take longest: under load they decode in
  one step of 20.
- *lost*: requests without an answer within 600 s. Their clients then leave.
- *leaked*: requests and descriptors.
- *MB a minute*: the slope of the gateway's memory, as the median over all pairs of 10-second windows.
- *descriptors*: before, at the peak, and after.
- *faulty clients saw*: clients that disconnect, read nothing or send a mutated request. Requests that are invalid
  before they are scheduled are not in the ledger.

```
{chr(10).join(commands)}
```

{table(heads, rows)}

{table(["engine", "clients saw", "faulty clients saw", "faults", "ledger"], ends)}

Problems:

{chr(10).join(wrong) or "None."}

[Every fault alone](faults.md). [What happens when a part fails](../faults.md).
"""
    return wrapped(text) + "\n"
