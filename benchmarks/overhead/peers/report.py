"""The page and the tables of the comparison: medians over the rounds, with their ranges."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from benchmarks.markdown import table, wrapped
from benchmarks.overhead.peers.measure import SHAPES
from benchmarks.overhead.peers.servers import BASELINE, DIRECT, TWO

FIRST_BYTE, WHOLE, LOAD, PACED, BURST, MANY = (shape.name for shape in SHAPES)
"""The shapes of the tables, in the order of `SHAPES`."""

Number = Callable[[float], str]


def _fixed(digits: int, sign: str = "") -> Number:
    return lambda value: f"{value:{sign},.{digits}f}"


@dataclass(frozen=True, slots=True)
class Column:
    """A column: ``key`` of the records of ``shape``, less that of `DIRECT` in the same round if ``added``."""

    head: str
    shape: str
    key: str
    number: Number
    added: bool = False


LOAD_CPU = Column("CPU a request, µs", LOAD, "cpu_us_a_request", _fixed(0))
BURST_CPU = Column("CPU an event, µs", BURST, "cpu_us_an_event", _fixed(1))

TABLES: dict[str, tuple[Column, ...]] = {
    "One connection, one request after the other": (
        Column("added TTFT p50, ms", FIRST_BYTE, "ttft_p50_ms", _fixed(2, "+"), added=True),
        Column("p99, ms", FIRST_BYTE, "ttft_p99_ms", _fixed(2, "+"), added=True),
        Column("added time of a whole answer p50, ms", WHOLE, "whole_p50_ms", _fixed(2, "+"), added=True),
        Column("p99, ms", WHOLE, "whole_p99_ms", _fixed(2, "+"), added=True),
        Column("CPU a request, µs", WHOLE, "cpu_us_a_request", _fixed(0)),
    ),
    "32 connections, and 32 streams with a token every 20 ms": (
        Column("requests/s", LOAD, "per_s", _fixed(0)),
        LOAD_CPU,
        Column("CPU a paced event, µs", PACED, "cpu_us_an_event", _fixed(1)),
        Column("ITL p50, ms", PACED, "itl_p50_ms", _fixed(1)),
        Column("p99, ms", PACED, "itl_p99_ms", _fixed(1)),
    ),
    "500 streams that start at once, a token every 50 ms": (
        Column("TTFT p50, ms", BURST, "ttft_p50_ms", _fixed(0)),
        Column("p99, ms", BURST, "ttft_p99_ms", _fixed(0)),
        Column("ITL p99, ms", BURST, "itl_p99_ms", _fixed(1)),
        BURST_CPU,
        Column("failed", BURST, "failures", _fixed(0)),
    ),
    "2,000 streams, a token every 500 ms, and memory": (
        Column("memory a stream, KiB", MANY, "stream_kib", _fixed(0)),
        Column("TTFT p99, ms", MANY, "ttft_p99_ms", _fixed(0)),
        Column("failed", MANY, "failures", _fixed(0)),
        Column("peak memory, MiB", MANY, "peak_mib", _fixed(0)),
    ),
}

RATIOS = (
    Column("requests/s", LOAD, "per_s", _fixed(2)),
    Column("CPU a request", LOAD, "cpu_us_a_request", _fixed(2)),
    Column("CPU a paced event", PACED, "cpu_us_an_event", _fixed(2)),
    Column("added TTFT p50", FIRST_BYTE, "ttft_p50_ms", _fixed(2), added=True),
    Column("TTFT p99 of 500 streams", BURST, "ttft_p99_ms", _fixed(2)),
    Column("ITL p99 of 500 streams", BURST, "itl_p99_ms", _fixed(2)),
)
"""Columns as multiples of `BASELINE` in the same round. Unlike times, they hardly depend on the machine's speed."""


def values(runs: Sequence[dict[str, Any]], server: str, column: Column) -> list[float]:
    """Return the values of ``server`` in a column, one for each round that has one."""
    return [*by_round(runs, server, column).values()]


def by_round(runs: Sequence[dict[str, Any]], server: str, column: Column) -> dict[int, float]:
    """Return the values of ``server`` in a column by round."""
    at = {(run["round"], run["server"]): run[column.key] for run in runs if run["shape"] == column.shape}
    found = {}
    for (round_, name), value in at.items():
        if name != server or value is None:
            continue
        if not column.added:
            found[round_] = value
        elif (direct := at.get((round_, DIRECT))) is not None:
            found[round_] = value - direct
    return found


def ratios(runs: Sequence[dict[str, Any]], column: Column, server: str) -> list[float]:
    """Return ``server`` as a multiple of `BASELINE` in a column, for each round that has both."""
    own, other = by_round(runs, server, column), by_round(runs, BASELINE, column)
    return [own[round_] / other[round_] for round_ in own if other.get(round_)]


def cell(numbers: Sequence[float], number: Number) -> str:
    """Return the median and the range of ``numbers``, a dash without any."""
    if not numbers:
        return "-"
    middle, low, high = (number(value) for value in (median(numbers), min(numbers), max(numbers)))
    return middle if low == high else f"{middle} ({low} to {high})"


def rows(runs: Sequence[dict[str, Any]], columns: Sequence[Column]) -> list[list[str]]:
    """Return a row for each server; for `DIRECT` without what is added."""
    return [
        [
            server,
            *(
                cell([] if column.added and server == DIRECT else values(runs, server, column), column.number)
                for column in columns
            ),
        ]
        for server in dict.fromkeys(run["server"] for run in runs)
    ]


def tables(runs: Sequence[dict[str, Any]]) -> dict[str, tuple[list[str], list[list[str]]]]:
    """Return heads and rows by title, for the tables whose shapes were measured."""
    measured = {run["shape"] for run in runs}
    found = {}
    for title, columns in TABLES.items():
        if shown := [column for column in columns if column.shape in measured]:
            found[title] = (["server", *(column.head for column in shown)], rows(runs, shown))
    compared = [server for server in dict.fromkeys(run["server"] for run in runs) if server not in (DIRECT, BASELINE)]
    shown = [column for column in RATIOS if column.shape in measured]
    lines = [[server, *(cell(ratios(runs, one, server), one.number) for one in shown)] for server in compared]
    if any(run["server"] == BASELINE for run in runs) and shown and lines:
        found[f"Multiples of {BASELINE} in the same round"] = (["server", *(column.head for column in shown)], lines)
    return found


def failures(runs: Sequence[dict[str, Any]]) -> list[str]:
    """Return a line for each server and shape with failed requests: how many in all rounds, and the main cause."""
    lines = []
    for server, shape in dict.fromkeys((run["server"], run["shape"]) for run in runs if run["failures"]):
        those = [run for run in runs if (run["server"], run["shape"]) == (server, shape)]
        failed = sum(run["failures"] for run in those)
        cause = max(those, key=lambda run: run["failures"])["error"]
        lines.append(f"{server}, {shape}: {failed} of {failed + sum(run['answers'] for run in those)} failed ({cause})")
    return lines


TRIED = """## What was tried

| tried | effect | kept |
|---|---|---|
| a request does not wait for a prediction that decides nothing | a lower TTFT | yes |
| the prompts of all requests count together, so fewer wait for a prediction | less CPU in the predictor | yes |
| the first arrival of a turn is decided at once, the others of it together | fewer instructions for a stream | yes |
| young objects are collected each 50,000 of them, not 700 | less CPU, a shorter tail when many streams start | yes |
| such a prediction is asked for after 50 ms, and not for a request that has ended | less CPU in the predictor | yes |
| a held decision goes ahead as soon as the engine has no prompt left | a shorter tail when many streams start | yes |
| events that differ in their text only are not parsed | less CPU for an event | yes |
| a lone request, and most of several, are tested without arrays | faster decisions | yes |
| one placement, no timer for an arrived body, running sums of streams | fewer instructions for a request | yes |
| the head of a response and its first bytes in one write | one system call less | yes |
| events of one read count together, one timer for a server's responses | fewer instructions for a request | yes |
| an event with one token is written when it arrives, without the task of its request | less CPU for an event | yes |
| a refit of the step-time model sums its samples once | a lower TTFT p99 of one connection | yes |
| several processes that share the port | requests/s grow with the cores; a request takes as much CPU | as a setting |
| 71 modules of the request path compiled by mypyc | 20 to 25% fewer instructions, but not less CPU time | no |
| glibc's allocator, with and without huge pages, instead of Python's | not less CPU time | no |
| a CPython with profile-guided optimisation (Debian's) | fewer instructions, no clear effect on CPU time | no |
| CPython 3.13 and 3.14 (Debian's) | less CPU for 500 streams, no clear effect on a request | no |

With mypyc, a request behind a proxy took 1% to 6% more CPU time than without it. These are medians of 20 rounds of
`python -m benchmarks.overhead.before_after`, while other work ran on the machine. So fewer instructions alone do not
help. mypyc also needs a C compiler, minutes at each installation, and tests of two builds.

The allocators and the interpreters were compared in four or five rounds of the loads of this page. The allocators: with
`PYTHONMALLOC=malloc`, and with `GLIBC_TUNABLES=glibc.malloc.hugetlb=1` in addition. The interpreters: Debian's 3.11,
3.13 and 3.14.

One process is limited by its Python code. A request takes about 2 million instructions, in 700 Python calls
([counts](calls.md)). So the start of 500 streams takes about a billion instructions. An event of a stream takes 2% of
what a request takes, so the starts decide how long the burst lasts. `vllm-router` is compiled and does not schedule."""


def page(found: dict[str, Any]) -> str:
    """Return the page: the setup, the commands and the tables."""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items() if version)
    notes = [*found["skipped"], *failures(found["runs"])]
    versions = f" Versions: {versions}." if versions else ""
    parts = [
        f"""# Overhead beside other gateways

**CPU.** Upstream, gateway and load client share {found["cpus"]} cores and use real HTTP on 127.0.0.1. The upstream is
scripted: it answers at once, or sends tokens at a fixed pace. Medians over the rounds ({found["rounds"]}), in brackets
their range. In each round all servers start afresh and take turns, load by load. Other work on the host takes time from
these cores, so compare the servers of one round (the last table).{versions}

- *direct*: the client calls the upstream. *added*: in addition to direct, in the same round. The CPU time of direct is
  that of the upstream.
- *antares*: a proxy (`kind: http`) with an API key, SLO headers, queueing, the default policy, the predictor and
  metrics. The CPU time and the memory include those of the predictor's process.
- *{TWO}*: the same with [`server.processes: 2`](../scale.md#several-processes-on-one-machine). The upstream stands for
  two engines, one for each process.
- The other gateways run one worker with their default settings and route to one upstream. They do not schedule.
- *CPU an event* is all CPU time over the tokens, so it includes the request's own cost.
- *ITL*: time between two events of a stream, as the client reads them.
- *memory a stream*: growth over the idle server, at the highest. *peak memory* counts shared pages once per process.

```
python -m benchmarks.overhead.peers --rounds {found["rounds"]} --json > docs/results/peers.json
python -m benchmarks.overhead.peers --page docs/results/peers.json
```""",
        *(f"## {title}\n\n{table(heads, lines)}" for title, (heads, lines) in tables(found["runs"]).items()),
        *(["\n".join(f"- {note}" for note in notes)] if notes else []),
        TRIED,
    ]
    return wrapped("\n\n".join(parts)) + "\n"
