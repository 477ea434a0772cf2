"""Workloads for measurements: arrival times, lengths and SLOs, all derived from one seed.

Arrivals, lengths and categories use separate random streams (common random numbers). With one seed, request i has the
same lengths and bounds at every rate; only the gaps between arrivals scale. So curves over the rate are smooth, and
all policies at one seed see the same requests.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from lab.workload import code_chat, sessions
from lab.workload.arrivals import renewal, replay, unit_gaps
from lab.workload.lengths import SMALL_OUTPUTS, SMALL_PROMPTS, TRACES, WORKLOADS, Ints, Lengths, dataset, truncate
from lab.workload.sessions import SESSIONS

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


@dataclass(frozen=True, slots=True)
class WorkloadRequest:
    """One request of a workload.

    Attributes:
        at_s: arrival time, in seconds after the start.
        prompt_tokens: length of the prompt.
        output_tokens: length of the answer.
        ttft_slo_s, tpot_slo_s, e2e_slo_s: bounds in seconds; infinite if the request has no such bound.
        category: row of the SLO table, from 1.
        blocks: chained hashes of the blocks of `sessions.BLOCK_TOKENS` tokens of the prompt and the answer. Requests
            with equal leading hashes begin with the same tokens. The last block may be partial; its hash is the one of
            the full block in a later turn. Empty if the request shares no prefix.
        messages: tokens of each message of the prompt: the system prompt, then user and assistant in turn. Empty if the
            prompt is one message.
    """

    at_s: float
    prompt_tokens: int
    output_tokens: int
    ttft_slo_s: float
    tpot_slo_s: float
    category: int
    e2e_slo_s: float = math.inf
    blocks: tuple[int, ...] = ()
    messages: tuple[int, ...] = ()


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
    slo_table: str = "llama-3.1-8b",
    slo_scale: float = 1.0,
    mix: Mapping[int, float] | None = None,
    max_prompt: int | None = None,
    max_output: int | None = None,
) -> list[WorkloadRequest]:
    """Return a workload, in order of arrival.

    Args:
        name: source of the lengths, one of `workload_names`; see ``lab/workload/data/README.md``. Those of
            `lab.workload.sessions` are sessions, whose requests share prefixes.
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
            those of `PAPER_SLOS`.
        slo_scale: factor on every bound.
        mix: weight of each category, numbered from 1; categories not listed get weight 0. By default all are equal.
        max_prompt, max_output: limits in tokens. ``sharegpt`` excludes longer requests (1024 each by default). Other
            workloads truncate them; log-normal lengths have default limits, traces have none. In sessions,
            ``max_prompt`` limits the prompt with its history (7168 by default).

    Raises:
        ValueError: an unknown name (the message lists the known ones), a number out of range, or contradictory
            arguments.
    """
    if name in SLO_TABLES and slo_table in PAPER_SLOS:
        slo_table = name
    _check(name, qps, requests, duration_s, arrivals, burstiness, speed, trace, window_s, slo_table, slo_scale, seed)
    for limit, value in (("max_prompt", max_prompt), ("max_output", max_output)):
        if value is not None and value < 1:
            raise ValueError(f"{limit} must be at least 1")
    gaps, lengths, classes = (np.random.default_rng(stream) for stream in np.random.SeedSequence(seed).spawn(3))
    slos = SLO_TABLES[slo_table]
    ttft, tpot, e2e = np.array(slos, dtype=float).T * slo_scale
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
        bounds = [(float(ttft[c]), float(tpot[c]) / 1000, c + 1, float(e2e[c])) for c in range(len(slos))]
        return [
            WorkloadRequest(t.at_s, t.prompt_tokens, t.output_tokens, *bounds[t.category], t.blocks, t.messages)
            for t in turns
        ]
    recorded = trace or (name if name in TRACES else TRACES[0])
    if arrivals == "trace":
        times = dataset(recorded).at_s
        assert times is not None
        at_s = replay(times, qps=qps, speed=speed, window_s=window_s, requests=requests, duration_s=duration_s)
    else:
        assert qps is not None
        at_s = renewal(gaps, qps, burstiness, requests, duration_s)
    n = len(at_s)
    if arrivals == "trace" and recorded == name:
        data = dataset(name)
        prompts, outputs = truncate(data.prompt_tokens[:n], max_prompt), truncate(data.output_tokens[:n], max_output)
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
    for label, value, known in (
        ("workload", name, {**WORKLOADS, **SESSIONS}),
        ("arrivals", arrivals, ARRIVALS),
        ("trace", trace or TRACES[0], TRACES),
        ("SLO table", slo_table, SLO_TABLES),
    ):
        if value not in known:
            raise ValueError(f"unknown {label} {value!r}: choose one of {', '.join(known)}")
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
        raise ValueError(f"{arrivals} arrivals need requests or duration_s")
    if arrivals == "poisson" and burstiness != 1:
        raise ValueError("Poisson arrivals have burstiness 1: use gamma arrivals")
    if trace is not None or window_s is not None or speed != 1:
        raise ValueError("trace, window_s and speed need trace arrivals")
