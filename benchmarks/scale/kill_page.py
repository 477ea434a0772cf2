"""The page about the loss of one of two servers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from benchmarks.markdown import table, wrapped

_HEADS = {"http": "two HTTP servers", "ray": "two Ray actors"}


def page(found: dict[str, Any]) -> str:
    """The page: the set-up, the commands, and a column for each kind of servers."""
    kinds = list(dict.fromkeys(row["servers"] for row in found["rows"]))
    groups = [[row for row in found["rows"] if row["servers"] == kind] for kind in kinds]
    runs, seed = found["runs"], found["seed"]
    which = f"One run, seed {seed}:"
    if runs > 1:
        which = f"Median (range) of {runs} runs, seeds {seed} to {seed + runs - 1}. Ends and the ledger are sums:"
    what = (
        "vLLM on CPU with SmolLM2-135M-Instruct, one thread each"
        if found["engine"] == "vllm"
        else "simulated servers; no model runs"
    )
    failed = [f"- {row['servers']}, seed {row['seed']}: {line}" for row in found["rows"] for line in row["problems"]]
    rows = [[name, *(cell(group) for group in groups)] for name, cell in _ROWS]
    text = f"""# Loss of one of two servers

Two servers behind one gateway with the default policy, all on one machine with {found["cpus"]} shared cores: {what}.
Each of 12 clients sends one stream at a time, of three SLO classes, with 24 to 96 output tokens. After 10 s one server
gets SIGKILL: the process of an HTTP server, or the process of a Ray actor. The command starts an HTTP server again
after 1 s, as a supervisor does. Ray restarts an actor itself. In the 3 s after the kill, a short stream of 4 tokens
starts every 0.1 s. The load continues until the replacement has served requests.

The replacement loads its model on the cores of the remaining server. So the bounds are loose: with tight ones, the
policy would reject requests during that time. Streams may take 20 to 60 s to begin. Other programs used these cores
too, so servers took long to start and to end.

```
python -m benchmarks.scale.kill {f"--seed {seed} " if seed else ""}--runs {runs} --json > docs/results/scale.json
python -m benchmarks.scale.kill --page docs/results/scale.json
```

{which}

{table(["", *(_HEADS[kind] for kind in kinds)], rows)}

- *in flight*: streams that had begun and not ended when the server was killed. The error event is `engine_lost`, or
  `draining` if the engine leaves meanwhile.
- *moved*: requests that were placed on the killed server, and whose clients had received nothing. The other one served
  them.
- All times are seconds after the kill. *sockets closed*: by the kernel, which needs up to seconds to end a killed
  process on busy cores. Until its sockets close, the gateway cannot know that the server is gone.
- *last request to the killed server*: the gateway placed it there. It must be at most 1 s after the sockets closed.
- *shown as down*: by `/status`, and so by `antares top`.
- *served by the replacement*: requests until the load ended.
- *ledger*: requests that the gateway accepted, and how they ended. Some were sent before the load, to fill its pools.
- *lost*: requests without an answer, or whose outcome in the ledger is not what their client saw.

Failed checks:

{chr(10).join(failed) or "None."}

[Ray](../ray.md). [Failover](../failover.md).
"""
    return wrapped(text) + "\n"


def _number(name: str, digits: int = 0, missing: str = "unknown") -> Callable[[Sequence[dict[str, Any]]], str]:
    """Return a function that shows median and range of ``name``, or ``missing`` if a run has none."""

    def cell(rows: Sequence[dict[str, Any]]) -> str:
        values = [row.get(name) for row in rows]
        known = [value for value in values if value is not None]
        if len(known) < len(values):
            return missing
        shown = [f"{value:,.{digits}f}" for value in (median(known), min(known), max(known))]
        return shown[0] if len(values) == 1 else f"{shown[0]} ({shown[1]} to {shown[2]})"

    return cell


def _share(part: str, whole: str) -> Callable[[Sequence[dict[str, Any]]], str]:
    return lambda rows: f"{sum(row[part] for row in rows):,} of {sum(row[whole] for row in rows):,}"


def _ledger(rows: Sequence[dict[str, Any]]) -> str:
    total = {name: sum(row["ledger"][name] for row in rows) for name in rows[0]["ledger"]}
    ends = ", ".join(f"{total[name]:,} {name}" for name in ("finished", "failed", "rejected", "cancelled"))
    return f"{total['accepted']:,} accepted: {ends}"


def _left(rows: Sequence[dict[str, Any]]) -> str:
    return " / ".join(str(sum(row[name] for row in rows)) for name in ("lost", "leaked_requests", "leaked_descriptors"))


_ROWS: tuple[tuple[str, Callable[[Sequence[dict[str, Any]]], str]], ...] = (
    ("requests of the clients", _number("requests")),
    ("streams in flight on the killed server", _number("in_flight")),
    ("of them ended by an error event", _share("broken", "in_flight")),
    ("the last of them, s", _number("broken_within_s", 2)),
    ("other requests that completed", _share("completed", "others")),
    ("of them moved", _number("moved")),
    ("other requests rejected with 429", _number("rejected")),
    ("new requests in the first second", _number("new_first_s")),
    ("their TTFT, s, in the median", _number("new_ttft_s", 2)),
    ("sockets of the killed server closed, s", _number("closed_s", 2)),
    ("last request to the killed server, s", _number("leaves_s", 3)),
    ("shown as down, s", _number("shown_s", 2)),
    ("new requests until the replacement was up", _number("new_while_down")),
    ("replacement up, s", _number("back_s", 1)),
    ("served by the replacement", _number("taken")),
    ("all processes of the killed server ended, s", _number("ended_s", 1, "one still runs")),
    ("ledger", _ledger),
    ("lost / leaked requests / leaked descriptors", _left),
)
