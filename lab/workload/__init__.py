"""What is asked of a server in a measurement: arrivals, lengths and SLOs, all from one seed.

Arrivals, lengths and categories come from random streams of their own (common random numbers): with one seed, request
number i has the same lengths and bounds at every rate, and the gaps between arrivals only stretch. Curves over the rate
are smooth, and two policies at one seed see the same requests.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from lab.workload import code_chat
from lab.workload.arrivals import renewal, replayed
from lab.workload.lengths import SMALL_OUTPUTS, SMALL_PROMPTS, TRACES, WORKLOADS, Ints, Lengths, cut, rows

__all__ = [
    "ARRIVALS",
    "PAPER_SLOS",
    "SMALL_OUTPUTS",
    "SMALL_PROMPTS",
    "Asked",
    "Lengths",
    "make_workload",
    "slo_table_names",
    "workload_names",
]

ARRIVALS = ("poisson", "gamma", "trace")

PAPER_SLOS: dict[str, tuple[tuple[float, float], ...]] = {
    # (TTFT s, TPOT ms) of the six categories, SCORPIO table 1.
    "llama-3.1-8b": ((0.5, 30), (2, 30), (3, 30), (0.5, 50), (1, 50), (7.5, 50)),
    "gemma-2-27b": ((1, 60), (4, 60), (6, 60), (1, 100), (2, 100), (15, 100)),
}


SLO_TABLES: dict[str, tuple[tuple[float, float, float], ...]] = {
    # (TTFT s, TPOT ms, e2e s) of each category.
    **{name: tuple((ttft, tpot, math.inf) for ttft, tpot in slos) for name, slos in PAPER_SLOS.items()},
    **code_chat.SLOS,
}


@dataclass(frozen=True, slots=True)
class WorkloadRequest:
    """One request: when it is sent (s after the start), its sizes (tokens), its bounds (s), its category (from 1).

    A bound that it does not carry is infinite.
    """

    at_s: float
    prompt_tokens: int
    output_tokens: int
    ttft_slo_s: float
    tpot_slo_s: float
    category: int
    e2e_slo_s: float = math.inf


def workload_names() -> list[str]:
    """What `make_workload` makes."""
    return list(WORKLOADS)


def slo_table_names() -> list[str]:
    """The SLO tables that `make_workload` knows."""
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
    slo_table: str = "llama-3.1-8b",
    slo_scale: float = 1.0,
    mix: Mapping[int, float] | None = None,
    max_prompt: int | None = None,
    max_output: int | None = None,
) -> list[WorkloadRequest]:
    """A workload, in the order of arrival.

    Args:
        name: where the lengths come from, one of `workload_names`. ``lab/workload/data/README.md`` describes
            each.
        qps: mean arrival rate (1/s). With ``arrivals="trace"`` it may be left out, or stand in for ``speed``.
        requests, duration_s: the arrivals end at so many, or before so many seconds, whichever comes first. Poisson and
            Gamma need one of them; a trace ends by itself.
        seed: decides everything else.
        arrivals: ``poisson``, ``gamma`` (bursts), or ``trace`` (recorded times).
        burstiness: coefficient of variation of the gaps under ``gamma``; 1 is Poisson.
        speed: a trace is replayed so many times as fast.
        trace: whose arrival times; by default the workload's own, or ``azure-conv`` for a workload without. A trace
            replayed under its own name keeps its own lengths too; under another workload's (the paper's figure 5) it
            gives only the times.
        window_s: only the first so many seconds of the trace, before ``speed`` (the paper: 1200).
        slo_table: one of `slo_table_names`; ``slo_scale`` multiplies its bounds. ``code-chat`` has its own and takes
            those instead of the default.
        mix: weight of each category, numbered from 1; categories not named get none. By default all weigh the same.
        max_prompt, max_output: limits in tokens. ``sharegpt`` leaves out what is longer (1024 each by default),
            the others cut it (log-normals have limits of their own, traces none by default).

    Raises:
        ValueError: an unknown name (the message lists what exists), a number out of range, or arguments that
            contradict each other.
    """
    if name == code_chat.NAME and slo_table in PAPER_SLOS:
        slo_table = code_chat.NAME
    _check(name, qps, requests, duration_s, arrivals, burstiness, speed, trace, window_s, slo_table, slo_scale, seed)
    for limit, value in (("max_prompt", max_prompt), ("max_output", max_output)):
        if value is not None and value < 1:
            raise ValueError(f"{limit} must be at least 1")
    gaps, sizes, kinds = (np.random.default_rng(stream) for stream in np.random.SeedSequence(seed).spawn(3))
    recorded = trace or (name if name in TRACES else TRACES[0])
    if arrivals == "trace":
        times = rows(recorded).at_s
        assert times is not None
        at_s = replayed(times, qps=qps, speed=speed, window_s=window_s, requests=requests, duration_s=duration_s)
    else:
        assert qps is not None
        at_s = renewal(gaps, qps, burstiness, requests, duration_s)
    n = len(at_s)
    if arrivals == "trace" and recorded == name:
        prompts, outputs = cut(rows(name).prompt_tokens[:n], max_prompt), cut(rows(name).output_tokens[:n], max_output)
    else:
        prompts, outputs = WORKLOADS[name](sizes, n, max_prompt, max_output)
    slos = SLO_TABLES[slo_table]
    ttft, tpot, e2e = np.array(slos, dtype=float).T * slo_scale
    categories = _categories(kinds, n, len(slos), mix)
    if name == code_chat.NAME:
        prompts, outputs = code_chat.draw(sizes, np.isfinite(e2e[categories]), max_prompt, max_output)
    columns = (at_s, prompts, outputs, ttft[categories], tpot[categories] / 1000, categories + 1, e2e[categories])
    return [WorkloadRequest(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]


def _categories(random: np.random.Generator, n: int, count: int, mix: Mapping[int, float] | None) -> Ints:
    """Category of each request, from 0, shape (n,)."""
    weights = np.ones(count)
    if mix is not None:
        unknown = sorted(set(mix) - set(range(1, count + 1)))
        if unknown:
            raise ValueError(f"mix: no category {unknown[0]}; the table has 1 to {count}")
        weights = np.array([mix.get(category, 0.0) for category in range(1, count + 1)], dtype=float)
        if not np.isfinite(weights).all() or (weights < 0).any() or weights.sum() <= 0:
            raise ValueError("mix: weights must be finite, not negative, and not all zero")
    edges = np.cumsum(weights) / weights.sum()
    # The last category that has any weight also gets what rounding leaves above the last edge.
    drawn: Ints = np.searchsorted(edges, random.random(n), side="right")
    return np.minimum(drawn, int(np.flatnonzero(weights)[-1]))


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
    slo_table: str,
    slo_scale: float,
    seed: int,
) -> None:
    for what, value, known in (
        ("workload", name, WORKLOADS),
        ("arrivals", arrivals, ARRIVALS),
        ("trace", trace or TRACES[0], TRACES),
        ("SLO table", slo_table, SLO_TABLES),
    ):
        if value not in known:
            raise ValueError(f"unknown {what} {value!r}: choose one of {', '.join(known)}")
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
    if arrivals == "trace":
        if qps is not None and speed != 1:
            raise ValueError("a trace takes qps or speed, not both")
        return
    if qps is None:
        raise ValueError(f"{arrivals} arrivals need qps")
    if requests is None and duration_s is None:
        raise ValueError(f"{arrivals} arrivals need requests or duration_s")
    if arrivals == "poisson" and burstiness != 1:
        raise ValueError("Poisson arrivals have burstiness 1: use arrivals='gamma'")
    if trace is not None or window_s is not None or speed != 1:
        raise ValueError("trace, window_s and speed need arrivals='trace'")
