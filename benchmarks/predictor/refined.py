"""Measures, in simulation, how refining predictions of running requests changes goodput.

    python -m benchmarks.predictor.refined [--seeds 6] [--qps 42] [--duration 60] [--profile NAME] [--json]

Each policy runs each workload twice. *Refined* is normal operation: a request that exceeds its predicted length gets a
new prediction (`gateway.requests.length_survival`). *At arrival* keeps the first prediction. Predictions have the
errors of the shipped predictor. A run takes a few seconds.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import mean
from typing import Any

from engine_adapter.engine import EngineState
from engine_adapter.step_time.profile import load_profile
from gateway.policies.base import Decision, Policy
from gateway.policies.registry import make_policy
from gateway.requests.request import Request
from lab.simulate.predictions import predict
from lab.simulate.simulator import SimulationResult, simulate
from lab.workload import make_workload

POLICIES = ("scorpio", "slack")


@dataclass(slots=True)
class PredictionsAtArrival:
    """Wraps a policy and resets the predictions of running requests to those at arrival before each decision."""

    policy: Policy
    _p90: dict[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Name of the wrapped policy."""
        return self.policy.name

    @property
    def gate(self) -> str:
        """Gate of the wrapped policy."""
        return self.policy.gate

    def order(self, request: Request) -> tuple[float, ...]:
        """Return the order key of the wrapped policy."""
        return self.policy.order(request)

    def decide(
        self, now: float, waiting: Sequence[Request], running: Collection[Request], engine: EngineState
    ) -> Decision:
        """Return the decision of the wrapped policy. A request must be waiting in an earlier call before it runs."""
        self._p90 = {request.id: self._p90[request.id] for request in running}
        for request in running:
            request.predict(request.predicted_at_arrival, self._p90[request.id])
        self._p90 |= {request.id: request.predicted_p90 for request in waiting}
        return self.policy.decide(now, waiting, running, engine)


def compare(profile: str, qps: float, duration_s: float, seeds: int) -> list[dict[str, Any]]:
    """Return one row for each policy and seed, with goodput (1/s) and adherence of both variants."""
    engine = load_profile(profile)
    rows: list[dict[str, Any]] = []
    for seed in range(seeds):
        workload = make_workload("sharegpt", qps=qps, duration_s=duration_s, seed=seed)
        predictions = predict("shipped", workload, seed)
        for name in POLICIES:
            variants = {"at_arrival": partial(_at_arrival, name), "refined": partial(make_policy, name, {})}
            results = {label: simulate(workload, predictions, engine, make) for label, make in variants.items()}
            rows.append({"policy": name, "seed": seed, **{label: _figures(run) for label, run in results.items()}})
    return rows


def _at_arrival(name: str) -> Policy:
    return PredictionsAtArrival(make_policy(name, {}))


def _figures(run: SimulationResult) -> dict[str, float]:
    attained = sum(record.attained for record in run.results)
    return {"goodput": attained / run.duration_s, "slo_adherence": attained / len(run.results)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--qps", type=float, default=42.0)
    parser.add_argument("--duration", type=float, default=60.0, help="seconds of arrivals")
    parser.add_argument("--profile", default="a100-llama3.1-8b")
    parser.add_argument("--json", action="store_true", dest="as_json")
    options = parser.parse_args(arguments)
    rows = compare(options.profile, options.qps, options.duration, options.seeds)
    sys.stdout.write(json.dumps(rows, indent=2) + "\n" if options.as_json else _table(rows))


def _table(rows: list[dict[str, Any]]) -> str:
    titles = f"{'goodput, at arrival':>21}{'refined':>10}{'adherence, at arrival':>23}{'refined':>10}"
    lines = [f"{'policy':10}{'seed':>6}{titles}"]
    for name in POLICIES:
        own = [row for row in rows if row["policy"] == name]
        groups = [(str(row["seed"]), [row]) for row in own] + [("mean", own)]
        for seed, group in groups:
            goodput, adherence = (
                [mean(row[variant][metric] for row in group) for variant in ("at_arrival", "refined")]
                for metric in ("goodput", "slo_adherence")
            )
            cells = f"{goodput[0]:21.2f}{goodput[1]:10.2f}{adherence[0]:23.3f}{adherence[1]:10.3f}"
            lines.append(f"{name:10}{seed:>6}{cells}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
