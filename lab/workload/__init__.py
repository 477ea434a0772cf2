"""Workloads for measurements: arrival times, lengths and SLOs, all derived from one seed.

Arrivals, lengths and categories use separate random streams (common random numbers). With one seed, request i has the
same lengths and bounds at every rate; only the gaps between arrivals scale. So curves over the rate are smooth, and
all policies at one seed see the same requests.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np

from lab.workload import code_chat, sessions
from lab.workload.arrivals import renewal, replay, unit_gaps
from lab.workload.lengths import SMALL_OUTPUTS, SMALL_PROMPTS, TRACES, WORKLOADS, Ints, Lengths, dataset, truncate
from lab.workload.request import WorkloadRequest
from lab.workload.sessions import SESSIONS
from lab.workload.trace_file import UNITS, is_trace_file, read_trace
from lab.workload.trace_replay import arrival_times, recorded_workload, superposed

__all__ = [
    "ARRIVALS",
    "PAPER_SLOS",
    "SLO_TABLES",
    "SMALL_OUTPUTS",
    "SMALL_PROMPTS",
    "Lengths",
    "WorkloadRequest",
    "make_workload",
    "slo_table_names",
    "workload_names",
]

ARRIVALS = ("poisson", "gamma", "trace")

MAX_RATE_SCALE = 1000.0
"""Largest factor on the rate of a trace: each copy takes as much memory as the trace."""

PAPER_SLOS: dict[str, tuple[tuple[float, float], ...]] = {
    # (TTFT s, TPOT ms) of the six categories, SCORPIO table 1.
    "llama-3.1-8b": ((0.5, 30), (2, 30), (3, 30), (0.5, 50), (1, 50), (7.5, 50)),
    "gemma-2-27b": ((1, 60), (4, 60), (6, 60), (1, 100), (2, 100), (15, 100)),
}

SLO_TABLES: dict[str, tuple[tuple[float, float, float], ...]] = {
    # (TTFT s, TPOT ms, e2e s) of each category.
    **{name: tuple((ttft, tpot, math.inf) for ttft, tpot in slos) for name, slos in PAPER_SLOS.items()},
    **code_chat.SLOS,
    **sessions.SLOS,
}


def workload_names() -> list[str]:
    """Return the names that `make_workload` accepts."""
    return [*WORKLOADS, *SESSIONS]


def slo_table_names() -> list[str]:
    """Return the SLO tables that `make_workload` accepts."""
    return list(SLO_TABLES)


def make_workload(
    name: str,
    *,
    qps: float | None = None,
    requests: int | None = None,
    duration_s: float | None = None,
    seed: int = 0,
    arrivals: str = "poisson",
    burstiness: float = 1.0,
    speed: float = 1.0,
    trace: str | None = None,
    window_s: float | None = None,
    slo_table: str | Sequence[tuple[float, float, float]] = "llama-3.1-8b",
    slo_scale: float = 1.0,
    mix: Mapping[int, float] | None = None,
    max_prompt: int | None = None,
    max_output: int | None = None,
    rate_scale: float = 1.0,
    trace_unit: str | None = None,
    trace_block_tokens: int | None = None,
    trace_models: Sequence[str] = (),
) -> list[WorkloadRequest]:
    """Return a workload, in order of arrival.

    Args:
        name: source of the lengths, one of `workload_names`; see ``lab/workload/data/README.md``. Those of
            `lab.workload.sessions` are sessions, whose requests share prefixes. Or a file (`lab.workload.trace_file`).
        qps: mean arrival rate (1/s) of requests, all turns of sessions included. Optional with ``arrivals="trace"``,
            where it replaces ``speed``.
        requests, duration_s: limits on the number of requests and on their arrival times (s). The first limit that is
            reached ends the arrivals. Poisson and Gamma arrivals need one of them.
        seed: seed of all random streams.
        arrivals: one of `ARRIVALS`: ``poisson``, ``gamma`` (bursty) or ``trace`` (recorded times).
        burstiness: coefficient of variation of the gaps under ``gamma``; 1 is Poisson.
        speed: speed-up factor of a trace.
        trace: source of the arrival times. By default the workload's own trace, or ``azure-conv`` if it has none. A
            workload replayed on its own trace keeps the lengths of the trace as well. Another workload takes only the
            times from it (figure 5 of the SCORPIO paper).
        window_s: replay only this many seconds of the trace, before ``speed`` (the SCORPIO paper: 1200).
        slo_table: one of `slo_table_names`. The workloads ``code-chat`` and ``agents`` use their own tables instead of
            those of `PAPER_SLOS`. Or a table of your own: TTFT (s), TPOT (ms) and end-to-end bound (s) per category.
        slo_scale: factor on every bound.
        mix: weight of each category, numbered from 1; categories not listed get weight 0. By default all are equal.
        max_prompt, max_output: limits in tokens. ``sharegpt`` excludes longer requests (1024 each by default). Other
            workloads truncate them; log-normal lengths have default limits, traces have none. In sessions,
            ``max_prompt`` limits the prompt with its history (7168 by default).
        rate_scale: with trace arrivals, a factor on the rate that keeps the time scale (`trace_replay.superposed`).
        trace_unit, trace_block_tokens, trace_models: of a file; see `trace_file.read_trace`.

    Raises:
        ValueError: an unknown name (the message lists the known ones), a number out of range, or contradictory
            arguments.
    """
    if isinstance(slo_table, str):
        slo_table = name if name in SLO_TABLES and slo_table in PAPER_SLOS else slo_table
        _check_known("SLO table", slo_table, SLO_TABLES)
        slo_table = SLO_TABLES[slo_table]
    _check(name, qps, requests, duration_s, arrivals, burstiness, speed, trace, window_s, slo_scale, seed)
    _check_replay(name, arrivals, rate_scale, trace_unit, trace_block_tokens, trace_models)
    for limit, value in (("max_prompt", max_prompt), ("max_output", max_output)):
        if value is not None and value < 1:
            raise ValueError(f"{limit} must be at least 1")
    gaps, lengths, classes = (np.random.default_rng(stream) for stream in np.random.SeedSequence(seed).spawn(3))
    slos = slo_table
    ttft, tpot, e2e = np.array(slos, dtype=float).T * slo_scale
    if is_trace_file(name):
        recording = read_trace(
            name, unit=trace_unit, block_tokens=trace_block_tokens, window_s=window_s, models=trace_models
        )
        if arrivals == "trace":
            times, chosen, copies = superposed(arrival_times(recording, name), rate_scale, gaps)
            at_s = replay(times, qps=qps, speed=speed, window_s=None, requests=requests, duration_s=duration_s)
        else:
            assert qps is not None
            at_s = renewal(gaps, qps, burstiness, requests, duration_s)
            chosen, copies = lengths.integers(0, len(recording), len(at_s)), None
        drawn = _categories(classes, len(at_s), len(slos), mix)
        slo_rows = list(zip(ttft.tolist(), (tpot / 1000).tolist(), range(1, len(slos) + 1), e2e.tolist(), strict=True))
        bounds = [slo_rows[category] for category in drawn.tolist()]
        return recorded_workload(recording, at_s, chosen, copies, bounds, slo_scale, max_prompt, max_output)
    if name in SESSIONS:
        assert qps is not None
        turns = sessions.turns(
            name,
            _session_starts(gaps, qps / SESSIONS[name].mean_turns, burstiness),
            lambda: int(_categories(classes, 1, len(slos), mix)[0]),
            seed=seed,
            requests=requests,
            duration_s=duration_s,
            max_prompt=max_prompt,
            max_output=max_output,
        )
        by_category = [(float(ttft[c]), float(tpot[c]) / 1000, c + 1, float(e2e[c])) for c in range(len(slos))]
        return [
            WorkloadRequest(t.at_s, t.prompt_tokens, t.output_tokens, *by_category[t.category], t.blocks, t.messages)
            for t in turns
        ]
    recorded = trace or (name if name in TRACES else TRACES[0])
    if arrivals == "trace":
        recorded_s = dataset(recorded).at_s
        assert recorded_s is not None
        # Copies are of the window. Without copies, `replay` cuts it, because the rate depends on its length.
        whole = recorded_s if window_s is None or rate_scale == 1 else recorded_s[recorded_s < window_s]
        times, rows, _ = superposed(whole, rate_scale, gaps)
        at_s = replay(times, qps=qps, speed=speed, window_s=window_s, requests=requests, duration_s=duration_s)
    else:
        assert qps is not None
        at_s = renewal(gaps, qps, burstiness, requests, duration_s)
    n = len(at_s)
    if arrivals == "trace" and recorded == name:
        data = dataset(name)
        prompts = truncate(data.prompt_tokens[rows[:n]], max_prompt)
        outputs = truncate(data.output_tokens[rows[:n]], max_output)
    else:
        prompts, outputs = WORKLOADS[name](lengths, n, max_prompt, max_output)
    categories = _categories(classes, n, len(slos), mix)
    if name == code_chat.NAME:
        prompts, outputs = code_chat.draw(lengths, np.isfinite(e2e[categories]), max_prompt, max_output)
    columns = (at_s, prompts, outputs, ttft[categories], tpot[categories] / 1000, categories + 1, e2e[categories])
    return [WorkloadRequest(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]


def _session_starts(random: np.random.Generator, rate: float, cv: float) -> Iterator[float]:
    """Yield the times (s) at which sessions start: a renewal process of ``rate`` (1/s) from `sessions.WARMUP_S` on."""
    at_s = -sessions.WARMUP_S
    while True:
        at_s += float(unit_gaps(random, cv, 1)[0]) / rate
        yield at_s


def _categories(random: np.random.Generator, n: int, count: int, mix: Mapping[int, float] | None) -> Ints:
    """Return the category of each request, from 0, shape (n,)."""
    weights = np.ones(count)
    if mix is not None:
        unknown = sorted(set(mix) - set(range(1, count + 1)))
        if unknown:
            raise ValueError(f"mix: unknown category {unknown[0]}; the SLO table has categories 1 to {count}")
        weights = np.array([mix.get(category, 0.0) for category in range(1, count + 1)], dtype=float)
        if not np.isfinite(weights).all() or (weights < 0).any() or weights.sum() <= 0:
            raise ValueError("mix: weights must be finite, not negative, and not all zero")
    edges = np.cumsum(weights) / weights.sum()
    # Rounding may leave the last edge below 1; the last category with a weight gets the remainder.
    drawn: Ints = np.searchsorted(edges, random.random(n), side="right")
    return np.minimum(drawn, int(np.flatnonzero(weights)[-1]))


def _check_replay(
    name: str,
    arrivals: str,
    rate_scale: float,
    trace_unit: str | None,
    trace_block_tokens: int | None,
    trace_models: Sequence[str],
) -> None:
    if not (rate_scale > 0 and rate_scale <= MAX_RATE_SCALE):
        raise ValueError(f"rate_scale must be above 0 and at most {MAX_RATE_SCALE:g}, not {rate_scale:g}")
    if rate_scale != 1 and arrivals != "trace":
        raise ValueError("rate_scale needs trace arrivals")
    if trace_unit is not None and trace_unit not in UNITS:
        raise ValueError(f"unknown unit {trace_unit!r} of a trace: choose one of {', '.join(UNITS)}")
    if (trace_unit is not None or trace_block_tokens is not None or trace_models) and not is_trace_file(name):
        raise ValueError(f"trace_unit, trace_block_tokens and trace_models describe a file, and {name} is not one")


def _check_known(label: str, value: str, known: Collection[str]) -> None:
    if value not in known:
        raise ValueError(f"unknown {label} {value!r}: choose one of {', '.join(known)}")


def _check(
    name: str,
    qps: float | None,
    requests: int | None,
    duration_s: float | None,
    arrivals: str,
    burstiness: float,
    speed: float,
    trace: str | None,
    window_s: float | None,
    slo_scale: float,
    seed: int,
) -> None:
    for label, value, known in (
        ("workload", name, {**WORKLOADS, **SESSIONS, **({name: ()} if is_trace_file(name) else {})}),
        ("arrivals", arrivals, ARRIVALS),
        ("trace", trace or TRACES[0], TRACES),
    ):
        _check_known(label, value, known)
    for option, number in (
        ("qps", qps),
        ("requests", requests),
        ("duration_s", duration_s),
        ("burstiness", burstiness),
        ("speed", speed),
        ("window_s", window_s),
        ("slo_scale", slo_scale),
    ):
        if number is not None and not (number > 0 and math.isfinite(number)):
            raise ValueError(f"{option} must be a positive number, not {number}")
    if seed < 0:
        raise ValueError(f"seed must be at least 0, not {seed}")
    if name in SESSIONS and arrivals == "trace":
        raise ValueError(f"the sessions of {name} have no trace: use poisson or gamma arrivals")
    if arrivals == "trace":
        if qps is not None and speed != 1:
            raise ValueError("a trace accepts qps or speed, not both")
        return
    if qps is None:
        raise ValueError(f"{arrivals} arrivals need qps")
    if requests is None and duration_s is None:
        raise ValueError(f"{arrivals} arrivals have no end: set --requests or --duration (duration_s)")
    if arrivals == "poisson" and burstiness != 1:
        raise ValueError("Poisson arrivals have burstiness 1: use gamma arrivals")
    if trace is not None or window_s is not None or speed != 1:
        raise ValueError("a trace, a window and a speed need trace arrivals: --arrivals trace")
