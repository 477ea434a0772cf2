"""The measurements of `benchmarks.slack.study`: which settings, loads, policies and seeds each part of it needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

from benchmarks.policies.table import AS_PUBLISHED, SETTINGS, experiment
from benchmarks.slack.ablation import (
    BEST_EFFORT_PREEMPTION,
    FULL,
    MEMORY_CHECK,
    MIN_ADMISSION_SHARE,
    REMOVALS,
    STEP_CURVE,
)
from benchmarks.slack.best_effort_load import BACKGROUNDS, NONE
from lab.simulate.experiment import Experiment, Run
from lab.simulate.step_jitter import StepJitter

ABLATION_SETTINGS = [name for name in SETTINGS if "180 s" not in name]
"""Settings on which every component is removed. The longer run of the first setting is left out for time."""

BASE = ABLATION_SETTINGS[0]
"""The setting of all other parts: one A100 with Llama-3.1-8B, ShareGPT lengths, Poisson arrivals."""

CODE, CODE_CHAT = "a100, azure-code", "a100, code-chat"
"""Settings with long prompts and short answers, and with end-to-end bounds."""

CODE_CHAT_QPS = 23.89
"""S of `CODE_CHAT` (1/s), from docs/results/annealing_mixed.json."""

LOADS = (1.0, 2.0, 3.0)
"""Offered rates as multiples of S."""

OVERLOADS = (2.0, 3.0)
"""Loads at which no policy can serve all requests."""

BESIDE_LOADS = (0.8, 2.0)
"""Loads of the workload beside best-effort requests."""

LEVELS = (0.9, 0.99)
"""Adherence at which capacities are searched."""

LITTLE_MEMORY = 16_384
"""Tokens of KV memory at which it limits admission. The profile's own memory never fills with these bounds."""

COLUMNS = {
    "slack": ("slack", "chunked"),
    "scorpio": ("scorpio", "chunked"),
    AS_PUBLISHED: ("scorpio", "prefill-first"),
}
"""Policy and step mode by column, for comparisons with SCORPIO."""

PREDICTIONS = {
    "as shipped": "shipped",
    "the same for all": "constant",
    "twice as long": "shipped:2",
    "half as long": "shipped:0.5",
    "in reverse order": "reversed",
}
"""Predictors (`lab.simulate.predictions`) by the error that they make."""

CALIBRATIONS = {
    "true at first": (1.0, True),
    "half at first": (0.5, True),
    "twice at first": (2.0, True),
    "true, not learning": (1.0, False),
    "half, not learning": (0.5, False),
    "twice, not learning": (2.0, False),
}
"""Initial step times of the policy as a multiple of the true ones, and whether its model learns."""

JITTERS = {
    "0%, drift 0%": None,
    "5%, drift 3%": StepJitter(0.05, 0.03),
    "20%, drift 10%": StepJitter(0.2, 0.1),
}
"""Step jitter by description."""

BESIDE = {
    "slack": ("slack", FULL),
    f"slack without {BEST_EFFORT_PREEMPTION}": ("slack", BEST_EFFORT_PREEMPTION),
    "scorpio": ("scorpio", FULL),
    "mooncake": ("mooncake", FULL),
}
"""Policy and removed component by column, beside best-effort requests."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One run.

    Attributes:
        row, column, load: its place in the tables; the load is a multiple of S.
        setting: name of the setting.
        experiment, run: what `lab.simulate` runs.
        removed: the removed component of `slack`, a key of `REMOVALS`.
        step_time_factor: initial step times of the policy as a multiple of the true ones.
        condition: what differs from the setting; "" if nothing.
        background: the best-effort load, a key of `BACKGROUNDS`.
        by_tenant: whether requests have tenants, and the record has groups.
    """

    row: str
    column: str
    load: float
    setting: str
    experiment: Experiment
    run: Run
    removed: str = FULL
    step_time_factor: float = 1.0
    condition: str = ""
    background: str = NONE
    by_tenant: bool = False

    def case(self) -> dict[str, Any]:
        """Return the fields that identify the trial within its part."""
        return {
            "setting": self.setting,
            "condition": self.condition,
            "row": self.row,
            "column": self.column,
            "load": self.load,
            "seed": self.run.seed,
        }


@dataclass(frozen=True, slots=True)
class Search:
    """One search for the capacity of `slack` without the component ``row`` at a level of adherence."""

    row: str
    setting: str
    adherence: float
    experiment: Experiment = field(default_factory=Experiment)
    seeds: Sequence[int] = ()

    def case(self) -> dict[str, Any]:
        """Return the fields that identify the search."""
        return {"setting": self.setting, "row": self.row, "adherence": self.adherence}


@dataclass(frozen=True, slots=True)
class Study:
    """What all parts share: seconds of arrivals, seeds, and S (1/s) of each setting."""

    duration_s: float
    seeds: Sequence[int]
    stock_qps: Mapping[str, float]

    def experiment(self, setting: str, **changes: Any) -> Experiment:
        """Return the experiment of ``setting`` with ``changes`` to its fields."""
        if setting == CODE_CHAT:
            workload = {"name": "code-chat", "duration_s": self.duration_s}
            return replace(self.experiment(BASE), **{"workload": workload, **changes})
        return replace(experiment(setting, self.duration_s), **changes)

    def trials(
        self, row: str, load: float, *, setting: str = BASE, column: str = "slack",
        changes: Mapping[str, Any] | None = None, **fields: Any
    ) -> list[Trial]:  # fmt: skip
        """Return a trial for each seed, with ``changes`` to the experiment and ``fields`` of `Trial`."""
        policy, step_mode = COLUMNS[column]
        how = self.experiment(setting, step_mode=step_mode, **(changes or {}))
        qps = load * self.stock_qps[setting]
        return [Trial(row, column, load, setting, how, Run(policy, qps, seed), **fields) for seed in self.seeds]


def components(workload_has: str = "") -> list[str]:
    """Return `FULL` and the components that matter in every setting, or to workloads that have ``workload_has``."""
    return [name for name, removal in REMOVALS.items() if name == FULL or removal.needs == workload_has]


def ablation(study: Study) -> list[Trial]:
    """Return trials of `slack` without each component: in all settings, and in conditions where some matter more."""
    trials: list[Trial] = []

    def add(names: Sequence[str], loads: Sequence[float], **options: Any) -> None:
        for name, load in product(names, loads):
            trials.extend(study.trials(name, load, removed=name, **options))

    for setting in ABLATION_SETTINGS:
        add(components(), LOADS if setting == BASE else OVERLOADS, setting=setting)
    add((FULL, STEP_CURVE), LOADS[:1], setting=CODE)
    add(components("end-to-end bounds"), OVERLOADS, setting=CODE_CHAT)
    condition = f"{LITTLE_MEMORY:,} tokens of KV memory"
    changes = {"limits": {"kv_tokens": LITTLE_MEMORY}}
    add((FULL, MEMORY_CHECK), OVERLOADS[:1], changes=changes, condition=condition)
    return trials


def capacity(study: Study) -> list[Search]:
    """Return the searches for the capacity of `slack` without each component in every setting."""
    return [
        Search(name, setting, level, study.experiment(setting), study.seeds)
        for name, setting, level in product(components(), ABLATION_SETTINGS, LEVELS)
    ]


def tenants(study: Study) -> list[Trial]:
    """Return trials under overload with and without `min_admission_share`."""
    return [
        trial
        for load, name in product(OVERLOADS, (FULL, MIN_ADMISSION_SHARE))
        for trial in study.trials(name, load, removed=name, by_tenant=True)
    ]


def mis_prediction(study: Study) -> list[Trial]:
    """Return trials with wrong output lengths."""
    return _against_scorpio(study, {row: {"changes": {"predictor": name}} for row, name in PREDICTIONS.items()})


def mis_calibration(study: Study) -> list[Trial]:
    """Return trials with wrong initial step times of the policy. The gate in the engine always learns its own."""
    rows = {
        row: {"step_time_factor": factor, "changes": {"learn": learn}} for row, (factor, learn) in CALIBRATIONS.items()
    }
    return _against_scorpio(study, rows)


def step_jitter(study: Study) -> list[Trial]:
    """Return trials with step jitter."""
    return _against_scorpio(study, {row: {"changes": {"step_jitter": jitter}} for row, jitter in JITTERS.items()})


def best_effort_load(study: Study) -> list[Trial]:
    """Return trials of a workload that follows best-effort requests."""
    how = study.experiment(BASE)
    return [
        Trial(name, column, load, BASE, how, Run(policy, load * study.stock_qps[BASE], seed), removed, background=name)
        for load, name, (column, (policy, removed)), seed in product(
            BESIDE_LOADS, BACKGROUNDS, BESIDE.items(), study.seeds
        )
    ]


def _against_scorpio(study: Study, rows: Mapping[str, Mapping[str, Any]]) -> list[Trial]:
    """Return a trial of each column at each load, with the arguments of `Study.trials` of each row."""
    return [
        trial
        for load, (row, arguments), column in product(LOADS, rows.items(), COLUMNS)
        for trial in study.trials(row, load, column=column, **arguments)
    ]


PARTS: dict[str, Callable[[Study], Sequence[Trial | Search]]] = {
    "ablation": ablation,
    "capacity": capacity,
    "tenants": tenants,
    "mis-prediction": mis_prediction,
    "mis-calibration": mis_calibration,
    "step-jitter": step_jitter,
    "best-effort-load": best_effort_load,
}
"""The trials or searches of each part of the study."""
