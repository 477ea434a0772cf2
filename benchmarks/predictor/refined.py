"""What refining predictions while requests run does to goodput, simulated.

    python -m benchmarks.predictor.refined [--seeds 6] [--qps 42] [--duration 60] [--profile NAME] [--json]

Each workload is played twice for each policy: once as it is, where a request that outlives its predicted length is
expected to become as long as those that do (`gateway.requests.length_survival`), and once believing throughout what
was predicted at
its arrival. A few seconds a run; the shipped predictor's errors.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
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
class AsPredictedAtArrival:
    """A policy that is shown what was predicted at arrival, however long a request has run."""

    policy: Policy

    @property
    def name(self) -> str:
        """The policy's own."""
        return self.policy.name

    @property
    def gate(self) -> str:
        """The policy's own."""
        return self.policy.gate

    def order(self, request: Request) -> tuple[float, ...]:
        """The policy's own."""
        return self.policy.order(request)

    def decide(
        self, now: float, waiting: Sequence[Request], running: Collection[Request], engine: EngineState
    ) -> Decision:
        """The policy's own, without what was refined."""
        for request in running:
            # Of `Request.predict` all but the bounds that it plans: this one runs.
            request.predicted_tokens, request.predicted_p90 = request.predicted_at_arrival, request._p90_at_arrival
            request._spread()
        return self.policy.decide(now, waiting, running, engine)


def compare(profile: str, qps: float, duration_s: float, seeds: int) -> list[dict[str, Any]]:
    """A row for each policy and seed: goodput (1/s) and adherence, as predicted at arrival and refined."""
    engine = load_profile(profile)
    rows: list[dict[str, Any]] = []
    for seed in range(seeds):
        workload = make_workload("sharegpt", qps=qps, duration_s=duration_s, seed=seed)
        predictions = predict("shipped", workload, seed)
        for name in POLICIES:
            ways = {"at_arrival": partial(_believing, name), "refined": partial(make_policy, name, {})}
            played = {how: simulate(workload, predictions, engine, make) for how, make in ways.items()}
            rows.append({"policy": name, "seed": seed, **{how: _figures(came) for how, came in played.items()}})
    return rows


def _believing(name: str) -> Policy:
    return AsPredictedAtArrival(make_policy(name, {}))


def _figures(came: SimulationResult) -> dict[str, float]:
    attained = sum(one.attained for one in came.results)
    return {"goodput": attained / came.duration_s, "slo_adherence": attained / len(came.results)}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
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
        shown = [(str(row["seed"]), [row]) for row in own] + [("mean", own)]
        for seed, some in shown:
            before, after = (
                [mean(row[how][what] for row in some) for how in ("at_arrival", "refined")]
                for what in ("goodput", "slo_adherence")
            )
            lines.append(f"{name:10}{seed:>6}{before[0]:21.2f}{before[1]:10.2f}{after[0]:23.3f}{after[1]:10.3f}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
