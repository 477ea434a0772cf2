"""Runs of simulated fleets behind the gateway's router, as the studies of routing and of gateways record them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from lab.simulate.experiment import Experiment, Run, perform
from lab.simulate.step_jitter import USUAL_JITTER, StepJitter

POLICY = "slack"
SLOTS = 1024
"""Sequences of an engine's batch. With the 256 of the profiles, slots limit the looser classes before time does."""

A100 = "a100-llama3.1-8b"


def fleet_of(
    workload: dict[str, Any],
    duration_s: float,
    replicas: int,
    routing: str,
    profiles: tuple[str, ...] = (),
    gateways: int = 1,
    step_jitter: StepJitter | None = USUAL_JITTER,
) -> Experiment:
    """Return the experiment of ``replicas`` engines. Those after the first use A100 and ``profiles`` in turn."""
    return Experiment(
        profile=A100,
        workload={**workload, "duration_s": duration_s},
        replicas=replicas,
        routing=routing,
        profiles=profiles,
        gateways=gateways,
        limits={"max_num_seqs": SLOTS},
        step_jitter=step_jitter,
    )


def fleet_run(experiment: Experiment, qps: float, seed: int, fields: Sequence[str]) -> dict[str, Any]:
    """Return one run at ``qps`` (1/s), with ``fields`` of its record.

    ``goodput``: attained requests per second of arrivals, since a drain would count against the policy that rejects
    less. ``routing_us``, ``policy_us``: CPU time per request (us). ``cpu_s``: of the whole run.
    """
    started = time.process_time()
    record = perform(experiment, Run(POLICY, qps, seed))
    requests = record["requests"]
    return {
        "goodput": round(record["slo_adherence"] * requests / experiment.workload["duration_s"], 1),
        "routing_us": round(1e6 * record["routing_s"] / requests, 1),
        "policy_us": round(1e6 * record["scheduling_s"] / requests, 1),
        "cpu_s": round(time.process_time() - started, 1),
        **{field: record[field] for field in fields},
    }
