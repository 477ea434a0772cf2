"""One simulation with each request's fate at hand, for figures that need more than a run record."""

from __future__ import annotations

from lab.simulate.experiment import Experiment, Run, parse_policy
from lab.simulate.predictions import predict
from lab.simulate.simulator import SimulationResult, simulate
from lab.workload import WorkloadRequest


def played(experiment: Experiment, run: Run) -> tuple[list[WorkloadRequest], SimulationResult]:
    """What was asked, and what came of it."""
    asked = experiment.requests(run.qps, run.seed)
    came = simulate(
        asked,
        predict(experiment.predictor, asked, run.seed),
        experiment.engine(),
        lambda: parse_policy(run.policy),
        step_mode=experiment.step_mode,
        replicas=experiment.replicas,
        learn=experiment.learn,
    )
    return asked, came
