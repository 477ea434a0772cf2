"""What each part of `slack` is worth, whom it serves, and what errors of prediction cost it. Simulated.

    python -m benchmarks.slack.study --seeds 5 --duration 60 --json docs/results/slack_study.json
    python -m benchmarks.slack.study --page docs/results/slack_study.json

One A100 with Llama-3.1-8B (the profile ``a100-llama3.1-8b``), ShareGPT lengths, Poisson arrivals, chunked prefill and
the shipped predictor's errors, but for what a part of the study changes. S is as in `benchmarks.policies.table`. Runs
with the same seed see the same requests.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console

from benchmarks.figures.lab import Lab, laboratory
from benchmarks.policies.table import AS_PUBLISHED, KEEPS, experiment
from benchmarks.slack.ablation import FULL, MAKING_WAY, WITHOUT
from benchmarks.slack.best_effort_load import CROWDS, NOBODY, behind, crowd_done_s, own
from benchmarks.slack.study_page import EVERYBODY, page
from lab.records.run_record import RequestResult, run_record
from lab.simulate.experiment import Experiment, Run, capacity, parse_policy
from lab.simulate.predictions import PredictedLength, predict
from lab.simulate.simulator import simulate
from lab.simulate.step_jitter import StepJitter
from lab.workload import WorkloadRequest

SETTING = "a100-llama3.1-8b"
LOADS = (1.0, 2.0, 3.0)
OVERLOADS = (2.0, 3.0)
"""Loads at which not all can be served. A floor is of use only there."""

LITTLE_MEMORY = 16_384
"""Tokens. The profile's own KV memory never fills at these bounds, so that its part is tried with this much."""

CODE_QPS = 1.84
"""S of the azure-code workload on this profile (`benchmarks.policies.table`)."""

MIXED_QPS = 23.89
"""S of the code-chat workload on this profile (`benchmarks.annealing.mixed`)."""

CONTENDERS = {
    "slack": ("slack", "chunked"),
    "scorpio": ("scorpio", "chunked"),
    AS_PUBLISHED: ("scorpio", "prefill-first"),
}
"""Policy and step mode of each column beside errors."""

PREDICTORS = {
    "as shipped": "shipped",
    "the same for all": "constant",
    "twice too long": "shipped:2",
    "half as long": "shipped:0.5",
    "in reverse order": "reversed",
}
"""Wrong output lengths, by `lab.simulate.predictions`."""

BELIEFS = {
    "right at first": (1.0, True),
    "half at first": (0.5, True),
    "twice at first": (2.0, True),
    "right, never learning": (1.0, False),
    "half, never learning": (0.5, False),
    "twice, never learning": (2.0, False),
}
"""Step times that a policy believes, over the true ones; and whether it learns from the steps it sees."""

BESIDE_CROWDS = {
    "slack": ("slack", FULL),
    f"slack without {MAKING_WAY}": ("slack", MAKING_WAY),
    "scorpio": ("scorpio", FULL),
    "mooncake": ("mooncake", FULL),
}
"""Policy, and what is taken out of it, of each column beside a crowd."""

CROWDED_LOADS = (0.8, 2.0)

UNSTEADY = {
    "as expected": None,
    "5%, drifting by 3%": StepJitter(0.05, 0.03),
    "20%, drifting by 10%": StepJitter(0.2, 0.1),
}
"""How much steps vary, by `lab.simulate.step_jitter`."""

KEYS = ("goodput", "slo_adherence", "rejected", "ttft_violations", "tpot_violations", "preemptions")


@dataclass(frozen=True, slots=True)
class Trial:
    """One run. ``row``, ``column`` and ``load`` (in S) say where it stands in the tables.

    ``without``: of `WITHOUT`. ``believed``: step times that the policy is told, over the true ones. ``where``: what is
    not as in the other trials. ``crowd``: of `CROWDS`. ``by_tenant``: whether requests have tenants (`tenants_of`), and
    groups of requests are recorded.
    """

    row: str
    column: str
    load: float
    experiment: Experiment
    run: Run
    without: str = FULL
    believed: float = 1.0
    where: str = ""
    crowd: str = NOBODY
    by_tenant: bool = False


@dataclass(frozen=True, slots=True)
class Study:
    """What stays the same: the experiment, S (1/s), the seeds."""

    experiment: Experiment
    stock_qps: float
    seeds: Sequence[int]

    def trials(self, row: str, load: float, column: str = "slack", **changes: Any) -> list[Trial]:
        """One for each seed; ``changes`` are to `Trial`."""
        policy, mode = CONTENDERS[column]
        how = replace(changes.pop("experiment", self.experiment), step_mode=mode)
        return [
            Trial(row, column, load, how, Run(policy, load * self.stock_qps, seed), **changes) for seed in self.seeds
        ]


def ablation(study: Study) -> list[Trial]:
    """`slack` in full, and with each part taken out; four of them also where they matter."""
    little = replace(study.experiment, limits={"kv_tokens": LITTLE_MEMORY})
    code = replace(study.experiment, workload=study.experiment.workload | {"name": "azure-code"})
    names = [name for name in WITHOUT if name != MAKING_WAY]
    trials = [t for load in LOADS for name in names for t in study.trials(name, load, without=name)]
    for name in (FULL, "memory"):
        where = f"{LITTLE_MEMORY:,} tokens of KV memory"
        trials += study.trials(name, OVERLOADS[0], without=name, experiment=little, where=where)
    for name in (FULL, "curve"):
        there = replace(study, experiment=code, stock_qps=CODE_QPS)
        trials += there.trials(name, 1.0, without=name, where="the azure-code workload: long prompts, short answers")
    mixed = replace(study.experiment, workload=study.experiment.workload | {"name": "code-chat"})
    for name, load in product((FULL, "easing"), OVERLOADS):
        there = replace(study, experiment=mixed, stock_qps=MIXED_QPS)
        trials += there.trials(name, load, without=name, where="code and chat, code bounded end to end")
    for name in (FULL, "holding off"):
        where = "steps believed to take twice as long as they do, never learning"
        blind = replace(study.experiment, learn=False)
        trials += study.trials(name, OVERLOADS[0], without=name, experiment=blind, believed=2.0, where=where)
    return trials


def tenants(study: Study) -> list[Trial]:
    """Who is served when not all can be, with the floor and without."""
    return [
        trial
        for load in OVERLOADS
        for name in (FULL, "min_admission_share")
        for trial in study.trials(name, load, without=name, by_tenant=True)
    ]


def predictors(study: Study) -> list[Trial]:
    """Output lengths that are wrong, for `slack` and SCORPIO alike."""
    how = study.experiment
    return contended(study, {row: {"experiment": replace(how, predictor=told)} for row, told in PREDICTORS.items()})


def step_times(study: Study) -> list[Trial]:
    """Step times that are wrong, for `slack` and SCORPIO alike. The gate in the engine always learns for itself."""
    how = study.experiment
    return contended(
        study,
        {
            row: {"believed": believed, "experiment": replace(how, learn=learn)}
            for row, (believed, learn) in BELIEFS.items()
        },
    )


def step_jitter(study: Study) -> list[Trial]:
    """Steps that vary, for `slack` and SCORPIO alike."""
    how = study.experiment
    return contended(study, {row: {"experiment": replace(how, step_jitter=by)} for row, by in UNSTEADY.items()})


def crowds(study: Study) -> list[Trial]:
    """Requests that nobody insists on, and what the others lose by them."""
    return [
        Trial(crowd, column, load, study.experiment, Run(policy, load * study.stock_qps, seed), without, crowd=crowd)
        for load in CROWDED_LOADS
        for crowd in CROWDS
        for column, (policy, without) in BESIDE_CROWDS.items()
        for seed in study.seeds
    ]


def contended(study: Study, rows: Mapping[str, dict[str, Any]]) -> list[Trial]:
    """Every contender at every load with each row's changes (`Study.trials`)."""
    return [
        trial
        for load in LOADS
        for row, changes in rows.items()
        for column in CONTENDERS
        for trial in study.trials(row, load, column, **changes)
    ]


PARTS: dict[str, Callable[[Study], list[Trial]]] = {
    "ablation": ablation,
    "tenants": tenants,
    "predictors": predictors,
    "step-times": step_times,
    "step_jitter": step_jitter,
    "crowds": crowds,
}


def tenants_of(asked: Sequence[WorkloadRequest], predictions: Sequence[PredictedLength]) -> list[str]:
    """Whose each request is: the tenth with the most tokens, as far as they are known when it comes (its prompt and the
    predicted answer), is one tenant's, the larger half of the others is another's, and the rest a third's.

    Whom a policy that is thrifty turns away first is thus one tenant, as it may be in life.
    """
    tokens = [each.prompt_tokens + predicted.tokens for each, predicted in zip(asked, predictions, strict=True)]
    middling, dear = np.quantile(tokens, [0.45, 0.9])
    return ["dear" if size > dear else "middling" if size > middling else "cheap" for size in tokens]


def play(trial: Trial) -> dict[str, Any]:
    """The record of one trial."""
    how, run, without = trial.experiment, trial.run, WITHOUT[trial.without]
    profile, asked = how.engine(), how.requests(run.qps, run.seed)
    predictions = predict(how.predictor, asked, run.seed)
    owners = tenants_of(asked, predictions) if trial.by_tenant else None
    crowd = CROWDS[trial.crowd]
    asked, predictions = behind(crowd, asked, predictions, how.predictor, run.seed)
    with without.around():
        came = simulate(
            asked,
            predictions,
            profile,
            without.make if run.policy == "slack" else partial(parse_policy, run.policy),
            step_mode=how.step_mode,
            times=None if trial.believed == 1 else profile.at_speed(trial.believed).step_times(),
            learn=how.learn,
            best_effort=crowd.best_effort,
            tenants=owners,
            step_jitter=how.step_jitter,
            seed=run.seed,
        )
    record = run_record(run.policy, run.qps or 0.0, run.seed, own(came.results), came.duration_s, wall_s=0.0,
                        preemptions=came.preemptions)  # fmt: skip
    where = {"row": trial.row, "column": trial.column, "load": trial.load, "seed": run.seed, "where": trial.where}
    groups = {"groups": _groups(came.results, owners)} if owners else {}
    done = {"crowd_done_s": round(crowd_done_s(came.results), 1)} if trial.crowd != NOBODY else {}
    return where | {key: record[key] for key in KEYS} | groups | done


def _groups(served: Sequence[RequestResult], owners: Sequence[str]) -> dict[str, dict[str, float]]:
    """Of each SLO class, each tenant, and everybody: requests, and the shares admitted and attained."""
    groups: dict[str, list[RequestResult]] = {}
    for one, owner in zip(served, owners, strict=True):
        bounds = f"{one.request.ttft_slo_s:g} s, {one.request.tpot_slo_s * 1000:g} ms"
        for name in (EVERYBODY, f"class {one.request.category}: {bounds}", f"tenant: {owner}"):
            groups.setdefault(name, []).append(one)
    return {
        name: {
            "requests": len(members),
            "admitted": round(sum(one.outcome != "rejected" for one in members) / len(members), 4),
            "attained": round(sum(one.attained for one in members) / len(members), 4),
        }
        for name, members in sorted(groups.items())
    }


def measure(study: Study, part: str, lab: Lab) -> list[dict[str, Any]]:
    """The records of a part of the study."""
    return lab.each(part, play, PARTS[part](study))


def main(
    seeds: Annotated[int, typer.Option(min=1, help="How many; they are 0, 1, ...")] = 5,
    duration: Annotated[float, typer.Option(min=1, help="Seconds of arrivals.")] = 60.0,
    jobs: Annotated[int, typer.Option(min=1, help="Processes.")] = 1,
    part: Annotated[list[str] | None, typer.Option(help="A part; repeat for several. [default: all]")] = None,
    stock_qps: Annotated[
        float | None, typer.Option(min=0.01, help="S, if it is known; else it is looked for.", show_default=False)
    ] = None,
    json_to: Annotated[
        Path | None,
        typer.Option(
            "--json", help="Write the records here, part by part; parts that it has of the same settings stay."
        ),
    ] = None,
    page_of: Annotated[
        Path | None, typer.Option("--page", help="Write the page of this JSON beside it, and end.")
    ] = None,
) -> None:
    """Take `slack` apart, look whom it serves, and tell it lies."""
    if page_of is not None:
        page_of.with_suffix(".md").write_text(page(json.loads(page_of.read_text(encoding="utf-8"))), encoding="utf-8")
        return
    unknown = sorted(set(part or ()) - set(PARTS))
    if unknown:
        raise typer.BadParameter(f"no part {unknown[0]!r}; there are {', '.join(PARTS)}", param_hint="--part")
    how, numbers = experiment(SETTING, duration), list(range(seeds))
    if stock_qps is None:
        stock_qps = round(capacity(how, "fcfs", numbers, KEEPS, precision=0.01, jobs=jobs)[0], 2)
    settings = {"seeds": numbers, "duration_s": duration, "stock_qps": stock_qps}
    made = _made(json_to, settings)
    with laboratory(jobs) as lab:
        for name in part or PARTS:
            made[name] = measure(Study(how, stock_qps, numbers), name, lab)
            found = settings | {"parts": {name: made[name] for name in PARTS if name in made}}
            if json_to is not None:
                json_to.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if json_to is None:
        Console(width=160).print(page(found), markup=False, highlight=False)


def _made(path: Path | None, settings: dict[str, Any]) -> dict[str, Any]:
    """The parts that the file has already, if they were made with these settings."""
    if path is None or not path.exists():
        return {}
    found = json.loads(path.read_text(encoding="utf-8"))
    same = all(found[key] == value for key, value in settings.items())
    return dict(found["parts"]) if same else {}


if __name__ == "__main__":
    typer.run(main)
