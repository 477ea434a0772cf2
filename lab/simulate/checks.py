"""Checks of the options of `antares simulate` before the first run."""

from __future__ import annotations

from pathlib import Path

from engine_adapter.simulated.scheduler import STEP_MODES
from gateway.scheduling.routing import make_routing
from lab.records.plot import check_plot
from lab.simulate.experiment import Experiment, parse_policy
from lab.simulate.predictions import predict
from lab.workload import make_workload


def check_hold(experiment: Experiment, hold: float, qps: list[float] | None) -> None:
    """Check the options that `--hold` depends on.

    Raises:
        ValueError: the target is out of range, or an option fixes the rate or the number of requests.
    """
    if not 0 < hold <= 1:
        raise ValueError("--hold is a fraction of all requests, above 0 and at most 1")
    if qps:
        raise ValueError("--hold searches for the rate: remove --qps")
    if experiment.workload["arrivals"] == "trace":
        raise ValueError("--hold needs arrivals with a variable rate: use --arrivals poisson or gamma")
    if experiment.workload["requests"] is not None:
        raise ValueError("--hold needs arrivals of a fixed duration: use --duration instead of --requests")


def check(
    experiment: Experiment, policies: list[str], rates: list[float | None], seeds: list[int], plot: Path | None
) -> None:
    """Check all settings before the first run.

    Raises:
        ValueError: an invalid setting.
        ModuleNotFoundError: a plot is requested and matplotlib is missing.
    """
    experiment.engines()
    make_routing(experiment.routing)
    if experiment.profiles and experiment.replicas <= len(experiment.profiles):
        raise ValueError(f"--profiles needs --replicas {len(experiment.profiles) + 1} or more")
    if experiment.gateways > experiment.replicas:
        raise ValueError(f"--gateways {experiment.gateways} needs --replicas {experiment.gateways} or more")
    if experiment.step_mode not in STEP_MODES:
        raise ValueError(f"unknown step mode {experiment.step_mode!r}: choose one of {', '.join(STEP_MODES)}")
    for policy in policies:
        parse_policy(policy)
    if any(seed < 0 for seed in seeds):
        raise ValueError("--seed must be at least 0")
    if plot is not None:
        check_plot(plot)
    sample = {**experiment.workload, "requests": 1}
    for rate in rates:
        predict(experiment.predictor, make_workload(qps=rate, seed=seeds[0], **sample), 0)
