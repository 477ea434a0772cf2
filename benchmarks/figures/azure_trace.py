"""SCORPIO, figure 5: twenty minutes of a recorded trace, and how many requests have attained their SLO by when."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.figures.drawing import canvas, legend, look
from benchmarks.figures.figure import Document, Figure, document
from benchmarks.figures.lab import DROPPED, Lab
from benchmarks.figures.qps_scaling import AUTHORS_BUDGET
from benchmarks.figures.records import Record, name_of, of, policies, ratio, table, times
from benchmarks.figures.replay import played
from lab.bounds import bounds, token_costs
from lab.records.run_record import RequestResult, run_record
from lab.simulate.experiment import Experiment, Run
from lab.workload.lengths import TRACES, dataset

NAME = "azure_trace"
POLICIES = ("fcfs", "s3", "mooncake", "scorpio")
SEED = 0
WINDOW_S = 1200.0
LONGEST_PROMPT = 7000
"""Of a trace's own prompts: what fits the profiles' 8192 tokens with its answer. Longer ones (3 of 9,613) are cut."""
POINTS = 60
PAPER = {"mooncake": 1.25, "fcfs": 2.01, "s3": 2.11}
"""SLO-met requests of SCORPIO over each."""


@dataclass(frozen=True, slots=True)
class Replay:
    """A trace's arrivals, ``speed`` times as fast, with lengths of ``lengths`` (``own``: the trace's)."""

    profile: str
    step_mode: str
    trace: str
    lengths: str
    speed: float

    def experiment(self, window_s: float) -> Experiment:
        """The simulator's settings."""
        own = self.lengths == "own"
        workload: dict[str, Any] = {
            "name": self.trace if own else self.lengths,
            "arrivals": "trace",
            "trace": self.trace,
            "speed": self.speed,
            "window_s": window_s,
            "max_prompt": LONGEST_PROMPT if own else None,
        }
        limits = {} if self.step_mode == "chunked" else dict(AUTHORS_BUDGET)
        return Experiment(self.profile, workload, step_mode=self.step_mode, limits=limits)


ENGINES = (("niyama-a100", "prefill-first"), ("a100-llama3.1-8b", "chunked"))
DRAWN = {
    "niyama-a100": (("azure-code", 1.0), ("azure-code", 2.0), ("azure-code", 4.0), ("azure-conv", 4.0)),
    "a100-llama3.1-8b": (("azure-code", 1.0), ("azure-code", 4.0), ("azure-code", 8.0), ("azure-conv", 8.0)),
}
OTHERS = {
    "niyama-a100": (("azure-code", 3.0), ("azure-conv", 1.0), ("azure-conv", 2.0), ("azure-conv", 3.0)),
    "a100-llama3.1-8b": (("azure-code", 2.0), ("azure-conv", 4.0), ("azure-conv", 6.0)),
}
"""Speeds at which the load goes from calm to overload; those drawn, and those that are in the table only."""


def _replays(quick: bool) -> list[Replay]:
    found = []
    for profile, step_mode in ENGINES:
        for trace, speed in DRAWN[profile][:1] if quick else (*DRAWN[profile], *OTHERS[profile]):
            found.append(Replay(profile, step_mode, trace, "sharegpt", speed))
        if not quick:
            found += [Replay(profile, step_mode, trace, "own", 1.0) for trace in TRACES]
    return sorted(found, key=lambda r: (r.profile != ENGINES[0][0], r.trace, r.lengths, r.speed))


def measure(lab: Lab, quick: bool) -> Document:
    """Every replay under every policy."""
    window_s = 20.0 if quick else WINDOW_S
    tasks = [(replay, policy, window_s) for replay in _replays(quick) for policy in POLICIES]
    replays = lab.each("Figure 5", replayed, tasks)
    return document(
        NAME,
        (SEED,),
        tuple(profile for profile, _ in ENGINES),
        window_s=window_s,
        arrivals={trace: _arrivals(trace, window_s) for trace in TRACES},
        replays=replays,
    )


def replayed(task: tuple[Replay, str, float]) -> Record:
    """The record of one replay, with the SLO-met count over time (``met`` by ``met_at_s``)."""
    replay, policy, window_s = task
    experiment = replay.experiment(window_s)
    asked, came = played(experiment, Run(policy, None, SEED))
    limit = bounds(asked, token_costs(experiment.engine()))
    record = run_record(
        policy, len(asked) * replay.speed / window_s, SEED, came.results, came.duration_s, wall_s=0.0, bounds=limit
    )
    at_s = [round(window_s / replay.speed * point / POINTS, 2) for point in range(POINTS + 1)] + [came.duration_s]
    return (
        asdict(replay)
        | {key: value for key, value in record.items() if key not in DROPPED}
        | {"slo_met": sum(one.attained for one in came.results)}
        | {"met_at_s": [round(at, 2) for at in at_s], "met": _met_by(came.results, at_s)}
        | {"arrived": _count_by([one.at_s for one in asked], at_s)}
    )


def _met_by(served: list[RequestResult], at_s: list[float]) -> list[int]:
    return _count_by(sorted(one.request.at_s + (one.e2e_s or 0.0) for one in served if one.attained), at_s)


def _count_by(events_s: list[float], at_s: list[float]) -> list[int]:
    # The clock's rounding must not lose the last one.
    return [bisect_right(events_s, at + 1e-6) for at in at_s]


def _arrivals(trace: str, window_s: float) -> dict[str, Any]:
    at_s = dataset(trace).at_s
    assert at_s is not None
    counts = np.bincount(at_s[at_s < window_s].astype(int), minlength=int(window_s))
    return {
        "requests": int(counts.sum()),
        "mean_per_s": round(float(counts.sum() / window_s), 3),
        "peak_per_s": int(counts.max()),
        "peak_minute": round(float(counts.argmax()) / 60, 1),
        "per_s": counts.tolist(),
    }


def draw(made: Document, folder: Path) -> list[str]:
    """The traces' arrivals, and cumulative SLO-met counts: a row a profile, a column a replay."""
    title = "Arrivals of the Azure LLM inference trace 2023, as recorded"
    with canvas(folder / "azure_arrivals.png", title, 1, 2, (10, 2.8), simulated=False) as (_, (cells,)):
        for axes, trace in zip(cells, ("azure-code", "azure-conv"), strict=True):
            counts = made["arrivals"][trace]["per_s"]
            axes.plot([second / 60 for second in range(len(counts))], counts, color="0.25", linewidth=0.6)
            axes.set_title(f"{trace}: the first {made['window_s'] / 60:g} minutes")
            axes.set_xlabel("minutes")
            axes.set_ylabel("requests in a second")
            axes.set_ylim(0, 70)
    columns = max(len(_drawn(made, profile)) for profile, _ in ENGINES)
    title = "SLO-met requests over time, arrivals of Azure traces, ShareGPT lengths"
    with canvas(folder / f"{NAME}.png", title, len(ENGINES), columns, (15, 6.6)) as (figure, grid):
        for line, (profile, step_mode) in zip(grid, ENGINES, strict=True):
            for axes, same in zip(line, _drawn(made, profile), strict=False):
                _draw_replay(axes, same)
                axes.set_title(f"{same[0]['trace']} x{same[0]['speed']:g} on {profile}\n{step_mode}")
            line[0].set_ylabel("SLO-met requests so far")
        for axes in grid[-1]:
            axes.set_xlabel("minutes")
        legend(figure, grid.ravel().tolist())
    return ["azure_arrivals.png", f"{NAME}.png"]


def _drawn(made: Document, profile: str) -> list[list[Record]]:
    found = [
        of(made["replays"], profile=profile, trace=trace, speed=speed, lengths="sharegpt")
        for trace, speed in DRAWN[profile]
    ]
    return [same for same in found if same]


def _draw_replay(axes: Any, same: list[Record]) -> None:
    for record in same:
        minutes = [at / 60 for at in record["met_at_s"]]
        label = "fcfs (stock vLLM)" if record["policy"] == "fcfs" else record["policy"]
        axes.plot(minutes, record["met"], color=look(record["policy"])[0], linewidth=1.7, label=label)
    minutes = [at / 60 for at in same[0]["met_at_s"]]
    axes.plot(minutes[:-1], same[0]["arrived"][:-1], color="0.5", linewidth=1, linestyle=":", label="arrived")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)


def section(made: Document) -> str:
    """Which trace it is, the table, the difference."""
    code, conv = (made["arrivals"][trace] for trace in ("azure-code", "azure-conv"))
    return f"""**The paper.** The first 20 minutes of "the Azure trace" give the arrivals, ShareGPT the lengths.
SCORPIO's count of
requests that met their SLO is 1.25 times Mooncake's, 2.01 times vLLM's and 2.11 times S3's in its example. Its
appendix says the
trace reaches over 60 requests in a second at about minute 14; its text speaks of spikes at minutes 3 to 5 and 9 to 11.

**Which trace is it?** The *code* trace of 2023, not the conversations: in the first {made["window_s"] / 60:g}
minutes it has a second with
{code["peak_per_s"]} arrivals at minute {code["peak_minute"]:g}, where the conversations never have more than
{conv["peak_per_s"]}; and it bursts
at the minutes that the paper names. On average it brings {code["mean_per_s"]:.2f} requests/s ({code["requests"]:,}
in all), the
conversations {conv["mean_per_s"]:.2f} ({conv["requests"]:,}).

![Arrivals of both traces](azure_arrivals.png)

**Here.** `niyama-a100` with prefill-first steps, the nearest to the paper's engine, and `a100-llama3.1-8b` with
chunked prefill, the
nearest to today's; one seed ({SEED}); both traces, at their own pace and sped up until the load hurts.

![SLO-met requests over time]({NAME}.png)

SLO-met requests, and how many times as many `scorpio` has as the others:

{_table(made["replays"])}

{_reading(made["replays"])}
"""


def _replays_of(replays: list[Record]) -> list[list[Record]]:
    keys = dict.fromkeys(tuple(r[k] for k in ("profile", "step_mode", "trace", "lengths", "speed")) for r in replays)
    fields = ("profile", "step_mode", "trace", "lengths", "speed")
    return [of(replays, **dict(zip(fields, key, strict=True))) for key in keys]


def _factor(same: list[Record], policy: str) -> float:
    met = {record["policy"]: record["slo_met"] for record in same}
    return ratio(met["scorpio"], met[policy])


def _table(replays: list[Record]) -> str:
    names = policies(replays)
    lines = []
    for same in _replays_of(replays):
        first = same[0]
        met = [str(record["slo_met"]) for record in same]
        factors = " / ".join(times(_factor(same, policy)) for policy in ("mooncake", "fcfs", "s3"))
        lengths = "its own" if first["lengths"] == "own" else first["lengths"]
        line = [f"`{first['profile']}`", f"{first['trace']} x{first['speed']:g}", f"{first['qps']:.1f}", lengths]
        share = f"{first['count_bound']:.2f} / {first['fair_bound']:.2f}"
        lines.append([*line, str(first["requests"]), *met, factors, share])
    heads = ["profile", "arrivals", "mean/s", "lengths", "requests", *map(name_of, names)]
    return table([*heads, "`scorpio` over Mooncake / stock / S3", "count / fair bound on the share"], lines)


def _reading(replays: list[Record]) -> str:
    near = [same for same in _replays_of(replays) if _is_paper(same[0])]
    plain = [same for same in near if same[0]["speed"] == 1]
    words = []
    if plain:
        got = ", ".join(f"{times(_factor(plain[0], p))} {p}" for p in PAPER)
        words.append(f"At the trace's own pace on `niyama-a100` `scorpio` has {got}; the paper 1.25x, 2.01x, 2.11x.")
    closest = min(near, key=lambda same: abs(_factor(same, "fcfs") - PAPER["fcfs"]))
    if closest[0]["speed"] != 1:
        got = ", ".join(f"{times(_factor(closest, p))} {p}" for p in PAPER)
        words.append(f"Of the speeds tried x{closest[0]['speed']:g} comes nearest to its factor over vLLM: {got}.")
    behind = [same for same in _replays_of(replays) if any(_factor(same, p) < 0.995 for p in POLICIES)]
    if behind:
        names = [
            f"{same[0]['trace']} x{same[0]['speed']:g} with {same[0]['lengths']} lengths on {same[0]['profile']}"
            for same in behind
        ]
        words.append(f"`scorpio` is **not** the best on {'; '.join(names)}.")
    factors = [_factor(same, "mooncake") for same in _replays_of(replays) if same[0]["lengths"] != "own"]
    words.append(
        f"Over Mooncake the factor lies between {times(min(factors))} and {times(max(factors))} on ShareGPT lengths."
    )
    return f"""**Where they differ, and why.** {" ".join(words)}

On a trace the factors follow from how much of the time the engine is overloaded: where nobody suffers they are 1, and
far beyond that a policy which rejects nothing is left with next to nothing. As in figure 4 our load is the lighter one
(shorter prompts, faster steps), so the same minutes hurt less here; sped up, they hurt as much.

With the traces' own prompts, {_mean_prompt("azure-conv"):.0f} tokens on average for conversations and
{_mean_prompt("azure-code"):.0f} for code, prefill takes most of the time, and SCORPIO's TPOT estimate knows nothing of
the prefills between two decodes: it admits what they will delay."""


def _is_paper(record: Record) -> bool:
    return (record["profile"], record["trace"], record["lengths"]) == (ENGINES[0][0], "azure-code", "sharegpt")


def _mean_prompt(trace: str) -> float:
    at_s = dataset(trace).at_s
    assert at_s is not None
    return float(dataset(trace).prompt_tokens[at_s < WINDOW_S].mean())


def headline(made: Document) -> str:
    """The paper's three factors, at the trace's own pace."""
    plain = next(s for s in _replays_of(made["replays"]) if _is_paper(s[0]) and s[0]["speed"] == 1)
    return (
        f"SLO-met requests of `scorpio` over Mooncake, stock vLLM, S3: "
        f"{', '.join(times(_factor(plain, p)) for p in PAPER)} at the "
        "trace's own pace; the paper 1.25x, 2.01x, 2.11x"
    )


FIGURE = Figure(NAME, "Twenty minutes of a recorded trace (SCORPIO, figure 5)", measure, draw, section, headline)
