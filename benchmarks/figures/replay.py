"""One simulation with the result of each request, for figures that need more than a run record."""

from __future__ import annotations

from lab.simulate.experiment import Experiment, Run, parse_policy
from lab.simulate.predictions import predict
from lab.simulate.simulator import SimulationResult, simulate
from lab.workload import WorkloadRequest


def simulate_run(experiment: Experiment, run: Run) -> tuple[list[WorkloadRequest], SimulationResult]:
    """The workload of ``run`` and the simulation's result for it."""
    workload = experiment.requests(run.qps, run.seed)
    result = simulate(
        workload,
        predict(experiment.predictor, workload, run.seed),
        experiment.engine(),
        lambda: parse_policy(run.policy),
        step_mode=experiment.step_mode,
        replicas=experiment.replicas,
        learn=experiment.learn,
    )
    return workload, result
