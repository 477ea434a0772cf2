"""Ablation and sensitivity of `slack`: the value of each component, fairness, and the cost of wrong inputs. Simulated.

    python -m benchmarks.slack.study --seeds 5 --duration 60 --jobs 2 --json docs/results/slack_study.json
    python -m benchmarks.slack.study --page docs/results/slack_study.json

Predictions have the errors of the shipped model, and steps are chunked, unless a part of the study changes that. S is
the capacity of stock vLLM at 90% adherence, from docs/results/policies.json. Runs with the same seed get the same
requests.

The study takes hours. It writes its JSON after each row and skips what the file already has, so it can be interrupted.
NOTE: delete the file after a change to the simulated code.
"""

from __future__ import annotations

import json
import time
from collections.abc import Hashable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console

from benchmarks import results_json
from benchmarks.command import Duration, Jobs, PageOf, Seeds, chosen, write_page
from benchmarks.figures.lab import Lab, laboratory
from benchmarks.slack.ablation import without
from benchmarks.slack.best_effort_load import BACKGROUNDS, NONE, background_done_s, of_workload, preceded
from benchmarks.slack.study_page import ALL, page
from benchmarks.slack.trials import ABLATION_SETTINGS, CODE_CHAT, CODE_CHAT_QPS, PARTS, Search, Study, Trial
from lab.records.run_record import RequestResult, run_record
from lab.simulate.experiment import capacity, parse_policy
from lab.simulate.predictions import PredictedLength, predict
from lab.simulate.simulator import simulate
from lab.workload import WorkloadRequest

STOCK = Path(__file__).resolve().parents[2] / "docs" / "results" / "policies.json"
"""The file that has S of each setting of `ABLATION_SETTINGS`."""

SETTINGS = (*ABLATION_SETTINGS, CODE_CHAT)
"""Names that ``--settings`` accepts."""

FIELDS = ("goodput", "slo_adherence", "rejected", "ttft_violations", "tpot_violations", "preemptions")
"""Fields of a run record that the results keep."""

CASE_FIELDS = ("setting", "condition", "row", "column", "load", "adherence", "seed")
"""Fields of `Trial.case` and `Search.case`."""

CAPACITY_PRECISION = 0.01
"""Relative precision of capacities, as for S."""

Record = dict[str, Any]


def stock_rates() -> dict[str, float]:
    """Return S (1/s) of each setting."""
    parts = json.loads(STOCK.read_text(encoding="utf-8"))["settings"]
    rates = {part["setting"]: part["stock_qps"] for part in parts}
    return {setting: rates[setting] for setting in ABLATION_SETTINGS} | {CODE_CHAT: CODE_CHAT_QPS}


def tenants_of(workload: Sequence[WorkloadRequest], predictions: Sequence[PredictedLength]) -> list[str]:
    """Return the tenant of each request, by the sum of its prompt and predicted output tokens.

    The tenth with the most tokens belongs to "expensive", the larger half of the others to "medium", the rest to
    "cheap". So the requests that `cost_weight` admits last belong to one tenant.
    """
    tokens = [
        request.prompt_tokens + predicted.tokens for request, predicted in zip(workload, predictions, strict=True)
    ]
    medium, expensive = np.quantile(tokens, [0.45, 0.9])
    return ["expensive" if size > expensive else "medium" if size > medium else "cheap" for size in tokens]


def measure(task: Trial | Search) -> Record:
    """Return the record of a trial or a search: the fields of its case, and what was measured."""
    if isinstance(task, Trial):
        return task.case() | _run(task)
    with without(task.row):
        rate, _ = capacity(task.experiment, "slack", task.seeds, task.adherence, precision=CAPACITY_PRECISION)
    return task.case() | {"capacity": round(rate, 3)}


def _run(trial: Trial) -> Record:
    how, run, background = trial.experiment, trial.run, BACKGROUNDS[trial.background]
    profile, workload = how.engine(), how.requests(run.qps, run.seed)
    predictions = predict(how.predictor, workload, run.seed)
    tenants = tenants_of(workload, predictions) if trial.by_tenant else None
    workload, predictions = preceded(background, workload, predictions, how.predictor, run.seed)
    factor = trial.step_time_factor
    with without(trial.removed):
        result = simulate(
            workload,
            predictions,
            profile,
            partial(parse_policy, run.policy),
            step_mode=how.step_mode,
            times=None if factor == 1 else profile.at_speed(factor).step_times(),
            learn=how.learn,
            best_effort=background.best_effort,
            tenants=tenants,
            step_jitter=how.step_jitter,
            seed=run.seed,
        )
    record = run_record(
        run.policy,
        run.qps or 0.0,
        run.seed,
        of_workload(result.results),
        result.duration_s,
        wall_s=0.0,
        preemptions=result.preemptions,
    )
    measured: Record = {key: record[key] for key in FIELDS}
    if tenants:
        measured["groups"] = _groups(result.results, tenants)
    if trial.background != NONE:
        measured["background_done_s"] = round(background_done_s(result.results), 1)
    return measured


def _groups(results: Sequence[RequestResult], tenants: Sequence[str]) -> dict[str, dict[str, float]]:
    """Return the requests of each SLO class, of each tenant and of all, and the shares admitted and attained."""
    groups: dict[str, list[RequestResult]] = {}
    for result, tenant in zip(results, tenants, strict=True):
        bounds = f"{result.request.ttft_slo_s:g} s, {result.request.tpot_slo_s * 1000:g} ms"
        for name in (ALL, f"class {result.request.category}: {bounds}", f"tenant: {tenant}"):
            groups.setdefault(name, []).append(result)
    return {
        name: {
            "requests": len(members),
            "admitted": round(sum(member.outcome != "rejected" for member in members) / len(members), 4),
            "attained": round(sum(member.attained for member in members) / len(members), 4),
        }
        for name, members in sorted(groups.items())
    }


class Results:
    """The document of the study, kept in a JSON file if ``path`` is given.

    Records of an existing file are kept if it has the same seeds, duration and rates.
    """

    def __init__(self, study: Study, path: Path | None) -> None:
        self._path = path
        self.document: dict[str, Any] = {
            "seeds": list(study.seeds),
            "duration_s": study.duration_s,
            "stock_qps": dict(study.stock_qps),
        }
        earlier: dict[str, Any] = {}
        if path is not None and path.exists():
            earlier = json.loads(path.read_text(encoding="utf-8"))
        same = all(earlier.get(key) == value for key, value in self.document.items())
        if earlier and not same:
            typer.echo(f"{path} has other seeds, duration or rates: measuring everything again", err=True)
        parts = earlier["parts"] if same else {}
        self.document["parts"] = {name: parts[name] for name in PARTS if name in parts}

    def missing(self, part: str, tasks: Sequence[Trial | Search]) -> list[Trial | Search]:
        """Return the tasks without a record."""
        have = {_key(record) for record in self.document["parts"].get(part, ())}
        return [task for task in tasks if _key(task.case()) not in have]

    def add(self, part: str, records: Sequence[Record], tasks: Sequence[Trial | Search]) -> None:
        """Add records of ``part`` and write the file, with the records in the order of ``tasks``, all of the part."""
        parts = self.document["parts"]
        by_key = {_key(record): record for record in (*parts.get(part, ()), *records)}
        keys = (_key(task.case()) for task in tasks)
        parts[part] = [by_key[key] for key in keys if key in by_key]
        self.document["parts"] = {name: parts[name] for name in PARTS if name in parts}
        if self._path is not None:
            results_json.write(self.document, self._path)


def _key(record: Mapping[str, Any]) -> Hashable:
    """Return the values of `CASE_FIELDS`, which identify a record within its part."""
    return tuple(record.get(name) for name in CASE_FIELDS)


def measure_part(study: Study, part: str, settings: Sequence[str], lab: Lab, results: Results) -> None:
    """Measure what ``results`` lacks of a part in ``settings``, row by row; report each row on stderr."""
    tasks = PARTS[part](study)
    missing = results.missing(part, [task for task in tasks if task.setting in settings])
    for row in dict.fromkeys(task.row for task in missing):
        started = time.monotonic()
        of_row = [task for task in missing if task.row == row]
        results.add(part, lab.each(f"{part}: {row}", measure, of_row), tasks)
        typer.echo(f"{part}: {row}: {len(of_row)} measured in {time.monotonic() - started:.0f} s", err=True)


def main(
    seeds: Seeds = 5,
    duration: Duration = 60.0,
    jobs: Jobs = 1,
    part: Annotated[
        list[str] | None, typer.Option(help="Measure this part; repeat for several. [default: all]")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option(help="Measure in this setting; repeat for several. [default: all]")
    ] = None,
    json_to: Annotated[
        Path | None, typer.Option("--json", help="Write the records to this file, and skip those that it has.")
    ] = None,
    page_of: PageOf = None,
) -> None:
    """Measure the ablation and the sensitivity of `slack`."""
    if page_of is not None:
        write_page(page_of, page)
        return
    chosen_parts = chosen("--part", part, PARTS)
    chosen_settings = chosen("--settings", settings, SETTINGS)
    study = Study(duration, list(range(seeds)), stock_rates())
    results = Results(study, json_to)
    with laboratory(jobs) as lab:
        for name in chosen_parts:
            measure_part(study, name, chosen_settings, lab, results)
    if json_to is None:
        Console(width=160).print(page(results.document), markup=False, highlight=False)


if __name__ == "__main__":
    typer.run(main)
