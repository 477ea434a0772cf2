"""`antares simulate --replicas search`: how many engines a workload needs under each policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lab.records.plot_sizing import plot_sizing
from lab.simulate.experiment import Experiment
from lab.simulate.lifecycle import Changes
from lab.simulate.progress import console, progress
from lab.simulate.replica_search import MAX_REPLICAS, Sizing, fewest_replicas

SEARCH = "search"
"""Value of ``--replicas`` that asks for the fewest replicas."""

TIMELINE_BINS = 60
"""Parts of the arrivals for which a search's plot and its JSON show what became of them."""


def number_of_replicas(text: str, further_profiles: int) -> int:
    """Return the number of replicas of ``--replicas``; for a search, the fewest that it may try.

    Raises:
        ValueError: neither a number nor `SEARCH`.
    """
    if text == SEARCH:
        return further_profiles + 1
    if not text.isdecimal() or not 1 <= int(text) <= MAX_REPLICAS:
        raise ValueError(f"--replicas must be a number from 1 to {MAX_REPLICAS}, or {SEARCH}; got {text[:40]!r}")
    return int(text)


def check_search(
    target: float, hold: float | None, rates: Sequence[float | None], gateways: int, changes: Changes | None
) -> None:
    """Check the options of a search. Raises ValueError."""
    if not 0 < target <= 1:
        raise ValueError("--target is a fraction of all requests, above 0 and at most 1")
    if hold is not None:
        raise ValueError("--hold searches for the rate of a number of replicas: give one, or remove --hold")
    if len(rates) > 1:
        raise ValueError("--replicas search takes one --qps")
    if gateways > 1:
        raise ValueError("--replicas search finds the engines of one gateway: give a number, or remove --gateways")
    if changes is not None and any(number for _, number in changes.failures):
        raise ValueError("--replicas search tries 1 replica too, so --fail can name replica 0 only: --fail SECONDS")


def size(
    experiment: Experiment,
    policies: Sequence[str],
    qps: float | None,
    seeds: Sequence[int],
    target: float,
    jobs: int,
    plot: Path | None,
) -> tuple[dict[str, Any], dict[str, Sizing]]:
    """Search the fewest replicas that keep ``target`` under each policy, and draw them to ``plot``.

    Returns the JSON document and the result of each policy.
    """
    experiment = replace(experiment, timeline_bins=TIMELINE_BINS)
    sizings = {}
    for policy in policies:
        with progress(f"Searching the replicas for {policy}", None) as advance:

            def tried(replicas: int, measured: float) -> None:
                advance(f"{replicas} replicas: adherence {measured:.4f}")

            sizings[policy] = fewest_replicas(experiment, policy, qps, seeds, target, jobs=jobs, on_try=tried)
    if plot is not None:
        answers = {
            policy: next(record["timeline"] for record in sizing.records if record["replicas"] == sizing.replicas)
            for policy, sizing in sizings.items()
            if sizing.replicas is not None
        }
        measured = {policy: sizing.tried for policy, sizing in sizings.items()}
        title = f"{experiment.profile}, {Path(experiment.workload['name']).name}"
        plot_sizing(measured, answers, target, plot, title)
        console.print(f"Wrote {plot}", markup=False)
    return {
        "target": target,
        "replicas": {policy: sizing.replicas for policy, sizing in sizings.items()},
        "runs": [record for sizing in sizings.values() for record in sizing.records],
    }, sizings
