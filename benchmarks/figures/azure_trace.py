"""SCORPIO, figure 5: twenty minutes of a recorded trace, and the number of SLO-met requests over time."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.figures.drawing import canvas, legend, look, plot_label
from benchmarks.figures.figure import Document, Figure, new_document
from benchmarks.figures.lab import Lab, shortened
from benchmarks.figures.qps_scaling import AUTHORS_BUDGET
from benchmarks.figures.records import Record, factor_text, matching, policies_of, ratio
from benchmarks.figures.replay import simulate_run
from benchmarks.markdown import policy_label, table
from lab.bounds import bounds, token_costs
from lab.records.run_record import RequestResult, run_record
from lab.simulate.experiment import Experiment, Run
from lab.workload.lengths import TRACES, dataset

NAME = "azure_trace"
POLICIES = ("fcfs", "s3", "mooncake", "scorpio")
SEED = 0
WINDOW_S = 1200.0
MAX_PROMPT = 7000
"""Maximum length in tokens of a trace's own prompts.

With its answer such a prompt fits the profiles' context of 8192 tokens. 3 of 9,613 prompts are longer and are cut."""
POINTS = 60
"""Number of intervals at which the SLO-met requests are counted."""
PAPER = {"mooncake": 1.25, "fcfs": 2.01, "s3": 2.11}
"""The paper's ratios of SCORPIO's SLO-met requests to those of each baseline."""


@dataclass(frozen=True, slots=True)
class Replay:
    """The arrivals of a trace, ``speed`` times as fast, with the lengths of ``lengths`` (``own``: the trace's)."""

    profile: str
    step_mode: str
    trace: str
    lengths: str
    speed: float

    def experiment(self, window_s: float) -> Experiment:
        """The simulation of the first ``window_s`` seconds of the trace."""
        own = self.lengths == "own"
        workload: dict[str, Any] = {
            "name": self.trace if own else self.lengths,
            "arrivals": "trace",
            "trace": self.trace,
            "speed": self.speed,
            "window_s": window_s,
            "max_prompt": MAX_PROMPT if own else None,
        }
        limits = {} if self.step_mode == "chunked" else dict(AUTHORS_BUDGET)
        return Experiment(self.profile, workload, step_mode=self.step_mode, limits=limits)


REPLAY_FIELDS = ("profile", "step_mode", "trace", "lengths", "speed")
ENGINES = (("niyama-a100", "prefill-first"), ("a100-llama3.1-8b", "chunked"))
DRAWN = {
    "niyama-a100": (("azure-code", 1.0), ("azure-code", 2.0), ("azure-code", 4.0), ("azure-conv", 4.0)),
    "a100-llama3.1-8b": (("azure-code", 1.0), ("azure-code", 4.0), ("azure-code", 8.0), ("azure-conv", 8.0)),
}
"""Traces and speeds in the figure, from light load to overload."""
TABLE_ONLY = {
    "niyama-a100": (("azure-code", 3.0), ("azure-conv", 1.0), ("azure-conv", 2.0), ("azure-conv", 3.0)),
    "a100-llama3.1-8b": (("azure-code", 2.0), ("azure-conv", 4.0), ("azure-conv", 6.0)),
}
"""Traces and speeds in the table but not in the figure."""


def _replays(quick: bool) -> list[Replay]:
    replays = []
    for profile, step_mode in ENGINES:
        for trace, speed in DRAWN[profile][:1] if quick else (*DRAWN[profile], *TABLE_ONLY[profile]):
            replays.append(Replay(profile, step_mode, trace, "sharegpt", speed))
        if not quick:
            replays += [Replay(profile, step_mode, trace, "own", 1.0) for trace in TRACES]
    return sorted(replays, key=lambda r: (r.profile != ENGINES[0][0], r.trace, r.lengths, r.speed))


def measure(lab: Lab, quick: bool) -> Document:
    """Run every replay with every policy."""
    window_s = 20.0 if quick else WINDOW_S
    tasks = [(replay, policy, window_s) for replay in _replays(quick) for policy in POLICIES]
    replays = lab.each("Figure 5", replay_record, tasks)
    return new_document(
        NAME,
        (SEED,),
        tuple(profile for profile, _ in ENGINES),
        window_s=window_s,
        arrivals={trace: _arrivals(trace, window_s) for trace in TRACES},
        replays=replays,
    )


def replay_record(task: tuple[Replay, str, float]) -> Record:
    """The record of one replay, with the SLO-met requests over time (``met`` counted at ``met_at_s``)."""
    replay, policy, window_s = task
    experiment = replay.experiment(window_s)
    workload, result = simulate_run(experiment, Run(policy, None, SEED))
    limit = bounds(workload, token_costs(experiment.engine()))
    qps = len(workload) * replay.speed / window_s
    record = run_record(policy, qps, SEED, result.results, result.duration_s, wall_s=0.0, bounds=limit)
    at_s = [round(window_s / replay.speed * point / POINTS, 2) for point in range(POINTS + 1)] + [result.duration_s]
    return (
        asdict(replay)
        | shortened(record)
        | {"slo_met": sum(one.attained for one in result.results)}
        | {"met_at_s": [round(at, 2) for at in at_s], "met": _met_by(result.results, at_s)}
        | {"arrived": _count_by([request.at_s for request in workload], at_s)}
    )


def _met_by(served: list[RequestResult], at_s: list[float]) -> list[int]:
    return _count_by(sorted(one.request.at_s + (one.e2e_s or 0.0) for one in served if one.attained), at_s)


def _count_by(events_s: list[float], at_s: list[float]) -> list[int]:
    # The tolerance keeps rounding of the times from dropping the last event.
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


def draw(document: Document, folder: Path) -> list[str]:
    """Draw the traces' arrivals, and the SLO-met requests over time: one row per profile, one column per replay."""
    title = "Arrivals of the Azure LLM inference trace 2023, as recorded"
    with canvas(folder / "azure_arrivals.png", title, 1, 2, (10, 2.8), simulated=False) as (_, (cells,)):
        for axes, trace in zip(cells, ("azure-code", "azure-conv"), strict=True):
            counts = document["arrivals"][trace]["per_s"]
            axes.plot([second / 60 for second in range(len(counts))], counts, color="0.25", linewidth=0.6)
            axes.set_title(f"{trace}: first {document['window_s'] / 60:g} minutes")
            axes.set_xlabel("minutes")
            axes.set_ylabel("requests per second")
            axes.set_ylim(0, 70)
    columns = max(len(_drawn(document, profile)) for profile, _ in ENGINES)
    title = "SLO-met requests over time, arrivals of Azure traces, ShareGPT lengths"
    with canvas(folder / f"{NAME}.png", title, len(ENGINES), columns, (15, 6.6)) as (figure, grid):
        for line, (profile, step_mode) in zip(grid, ENGINES, strict=True):
            for axes, replay in zip(line, _drawn(document, profile), strict=False):
                _draw_replay(axes, replay)
                axes.set_title(f"{replay[0]['trace']} x{replay[0]['speed']:g} on {profile}\n{step_mode}")
            line[0].set_ylabel("SLO-met requests, cumulative")
        for axes in grid[-1]:
            axes.set_xlabel("minutes")
        legend(figure, grid.ravel().tolist())
    return ["azure_arrivals.png", f"{NAME}.png"]


def _drawn(document: Document, profile: str) -> list[list[Record]]:
    found = [
        matching(document["replays"], profile=profile, trace=trace, speed=speed, lengths="sharegpt")
        for trace, speed in DRAWN[profile]
    ]
    return [replay for replay in found if replay]


def _draw_replay(axes: Any, replay: list[Record]) -> None:
    for record in replay:
        minutes = [at / 60 for at in record["met_at_s"]]
        policy = record["policy"]
        axes.plot(minutes, record["met"], color=look(policy)[0], linewidth=1.7, label=plot_label(policy))
    minutes = [at / 60 for at in replay[0]["met_at_s"]]
    axes.plot(minutes[:-1], replay[0]["arrived"][:-1], color="0.5", linewidth=1, linestyle=":", label="arrived")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)


def section(document: Document) -> str:
    """Which trace the paper used, the table, and the comparison."""
    code, conv = (document["arrivals"][trace] for trace in ("azure-code", "azure-conv"))
    return f"""**Paper.** Arrivals are the first 20 minutes of "the Azure trace", lengths are ShareGPT's. SCORPIO's
SLO-met requests are 1.25 times Mooncake's, 2.01 times vLLM's and 2.11 times S3's. The appendix says that the trace
exceeds 60 requests in a second at about minute 14. The text mentions spikes at minutes 3 to 5 and 9 to 11.

**Which trace.** The paper used the *code* trace of 2023, not the conversation trace. In the first
{document["window_s"] / 60:g} minutes the code trace has a second with {code["peak_per_s"]} arrivals, at minute
{code["peak_minute"]:g}. The conversation trace never exceeds {conv["peak_per_s"]}. The code trace also has bursts at
the minutes that the paper names. It has {code["mean_per_s"]:.2f} requests/s on average ({code["requests"]:,} in
total); the conversation trace has {conv["mean_per_s"]:.2f} ({conv["requests"]:,}).

![Arrivals of both traces](azure_arrivals.png)

**Here.** Two engines: `niyama-a100` with prefill-first steps, the nearest to the paper's engine, and
`a100-llama3.1-8b` with chunked prefill, the nearest to current vLLM. Both traces at their own speed, and sped up until
the engine is overloaded. One seed ({SEED}).

![SLO-met requests over time]({NAME}.png)

SLO-met requests, and the ratio of `scorpio` to the others:

{_table(document["replays"])}

{_reading(document["replays"])}
"""


def _by_replay(records: list[Record]) -> list[list[Record]]:
    """``records`` grouped by replay: one list per replay, with one record per policy."""
    keys = dict.fromkeys(tuple(record[field] for field in REPLAY_FIELDS) for record in records)
    return [matching(records, **dict(zip(REPLAY_FIELDS, key, strict=True))) for key in keys]


def _factor(replay: list[Record], policy: str) -> float:
    """SLO-met requests of ``scorpio`` over those of ``policy``."""
    met = {record["policy"]: record["slo_met"] for record in replay}
    return ratio(met["scorpio"], met[policy])


def _table(records: list[Record]) -> str:
    names = policies_of(records)
    lines = []
    for replay in _by_replay(records):
        first = replay[0]
        met = [str(record["slo_met"]) for record in replay]
        factors = " / ".join(factor_text(_factor(replay, policy)) for policy in ("mooncake", "fcfs", "s3"))
        line = [f"`{first['profile']}`", f"{first['trace']} x{first['speed']:g}", f"{first['qps']:.1f}"]
        limits = f"{first['count_bound']:.2f} / {first['fair_bound']:.2f}"
        lines.append([*line, first["lengths"], str(first["requests"]), *met, factors, limits])
    heads = ["profile", "arrivals", "mean/s", "lengths", "requests", *map(policy_label, names)]
    heads += ["`scorpio` over Mooncake / stock / S3", "count / fair bound on adherence"]
    return table(heads, lines)


def _reading(records: list[Record]) -> str:
    replays = _by_replay(records)
    like_paper = [replay for replay in replays if _is_paper(replay[0])]
    sentences = [
        f"At the trace's own speed on `niyama-a100`, `scorpio` has {_factors(replay)}; the paper reports 1.25x, 2.01x "
        "and 2.11x."
        for replay in like_paper
        if replay[0]["speed"] == 1
    ]
    closest = min(like_paper, key=lambda replay: abs(_factor(replay, "fcfs") - PAPER["fcfs"]))
    if closest[0]["speed"] != 1:
        sentences.append(
            f"At speed x{closest[0]['speed']:g} the ratio to vLLM is nearest to the paper's: {_factors(closest)}."
        )
    factors = [_factor(replay, "mooncake") for replay in replays if replay[0]["lengths"] != "own"]
    sentences.append(
        f"With ShareGPT lengths the ratio to Mooncake is {factor_text(min(factors))} to {factor_text(max(factors))}."
    )
    return f"""**Comparison.** {" ".join(sentences)}

{_losses(replays)}The ratios depend on the share of time in which the engine is overloaded. Where all requests are
served in time the ratios are 1; far beyond that, a policy that rejects nothing attains next to nothing. As in
figure 4, our load is the lighter one: prompts are shorter and steps are faster. So the same minutes overload our engine
less, until the trace is sped up.

With the traces' own prompts (on average {_mean_prompt("azure-conv"):.0f} tokens for conversations and
{_mean_prompt("azure-code"):.0f} for code), prefill takes most of the time. SCORPIO's TPOT estimate does not include
the prefills between two decodes, so it admits requests that those prefills then delay."""


def _factors(replay: list[Record]) -> str:
    names = {"mooncake": "Mooncake", "fcfs": "vLLM", "s3": "S3"}
    return ", ".join(f"{factor_text(_factor(replay, policy))} over {names[policy]}" for policy in PAPER)


def _losses(replays: list[list[Record]]) -> str:
    """The replays in which SCORPIO is behind another policy, as a list; empty if there are none."""
    lines = [
        f"- {replay[0]['trace']} x{replay[0]['speed']:g} with {replay[0]['lengths']} lengths on "
        f"`{replay[0]['profile']}`"
        for replay in replays
        if any(_factor(replay, policy) < 0.995 for policy in POLICIES)
    ]
    if not lines:
        return ""
    return "`scorpio` is **not** the best policy in:\n\n" + "\n".join(lines) + "\n\n"


def _is_paper(record: Record) -> bool:
    return (record["profile"], record["trace"], record["lengths"]) == (ENGINES[0][0], "azure-code", "sharegpt")


def _mean_prompt(trace: str) -> float:
    """Mean prompt length in tokens over the window."""
    at_s = dataset(trace).at_s
    assert at_s is not None
    return float(dataset(trace).prompt_tokens[at_s < WINDOW_S].mean())


def headline(document: Document) -> str:
    """The paper's three ratios at the trace's own speed."""
    replay = next(
        replay for replay in _by_replay(document["replays"]) if _is_paper(replay[0]) and replay[0]["speed"] == 1
    )
    return (
        f"SLO-met requests of `scorpio` over Mooncake, stock vLLM and S3: "
        f"{', '.join(factor_text(_factor(replay, policy)) for policy in PAPER)} at the trace's own speed; "
        "the paper reports 1.25x, 2.01x, 2.11x"
    )


FIGURE = Figure(NAME, "Twenty minutes of a recorded trace (SCORPIO, figure 5)", measure, draw, section, headline)
