"""Prefix caching in the simulator: hit rates, what the gateway predicts, and what both are worth."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from typer.testing import CliRunner

from engine_adapter.step_time.profile import Profile, Regime
from gateway.policies.registry import make_policy
from lab.cli import app
from lab.simulate.experiment import Experiment, Run, perform
from lab.simulate.predictions import predict
from lab.simulate.simulator import SimulationResult, simulate
from lab.workload import WorkloadRequest

# Whole simulations are four times slower under a coverage tracer; unit tests cover the same code.
pytestmark = pytest.mark.no_cover

HAND = Profile(
    name="hand",
    description="A step takes 10 ms, 1 ms per prompt token and 1 ms per decoding sequence.",
    provenance={},
    regimes=(Regime(math.inf, 0.01, 0.0, 1e-3, 1e-3, 0.0, 0.0),),
    max_num_seqs=8,
    max_num_batched_tokens=1000,
    max_model_len=1000,
    kv_tokens=10_000,
)
BLOCKS = tuple(range(1, 63))


def turn(at: float, prompt: int, output: int = 1, ttft: float = 60.0) -> WorkloadRequest:
    return WorkloadRequest(at, prompt, output, ttft, 1.0, 1, blocks=BLOCKS[: -(-(prompt + output) // 16)])


def run(workload: list[WorkloadRequest], policy: str = "fcfs", **options: Any) -> SimulationResult:
    return simulate(workload, predict("oracle", workload, 0), HAND, lambda: make_policy(policy), **options)


def test_hits_shorten_prefill_and_are_counted() -> None:
    # Turn two has 320 tokens, of which 160 + 20 - 1 are computed: eleven blocks. Turn three: 320 tokens are cached.
    result = run([turn(0, 160, 20), turn(5, 320), turn(10, 330)])
    assert [r.ttft_s for r in result.results] == pytest.approx([0.17, 0.01 + 0.144, 0.01 + 0.010])
    assert result.hit_rate == pytest.approx((176 + 320) / (160 + 320 + 330))
    # What follows the first prompt of 160 tokens, its answer, was in the cache too.
    assert result.predicted_hit_rate == pytest.approx((176 + 320) / (160 + 320 + 330))


def test_no_index_predicts_nothing_and_the_engine_caches_all_the_same() -> None:
    workload = [turn(0, 160, 20), turn(5, 320), turn(10, 330)]
    without = run(workload, prefix_index=False)
    assert (without.predicted_hit_rate, without.hit_rate) == (0.0, run(workload).hit_rate)


def test_no_caching_computes_all() -> None:
    result = run([turn(0, 160), turn(5, 160)], prefix_caching=False)
    assert [r.ttft_s for r in result.results] == pytest.approx([0.17, 0.17])
    assert result.hit_rate == 0.0


def test_policy_serves_a_cached_prompt_that_it_would_reject_without_the_index() -> None:
    # The whole prompt takes 0.9 s; uncached tokens 0.02 s.
    workload = [turn(0, 880), turn(5, 890, ttft=0.2)]
    assert [r.outcome for r in run(workload, "slack").results] == ["finished", "finished"]
    assert [r.outcome for r in run(workload, "slack", prefix_index=False).results] == ["finished", "rejected"]


def record(policy: str, **settings: Any) -> dict[str, Any]:
    experiment = Experiment(workload={"name": "agents", "duration_s": 20.0}, **settings)
    return perform(experiment, Run(policy, 20.0, 0))


def test_index_raises_the_goodput_of_slack_on_agents() -> None:
    with_index, without = record("slack"), record("slack", prefix_index=False)
    assert with_index["goodput"] > 1.2 * without["goodput"]
    assert with_index["predicted_hit_rate"] == pytest.approx(with_index["hit_rate"], abs=0.05)
    assert without["predicted_hit_rate"] == 0.0


@pytest.mark.parametrize("name", ["multi-turn", "agents"])
@pytest.mark.parametrize("policy", ["fcfs", "slack"])
def test_bounds_hold_with_prefix_caching(name: str, policy: str) -> None:
    for qps in (20.0, 60.0):
        experiment = Experiment(workload={"name": name, "duration_s": 6.0}, predictor="oracle")
        result = perform(experiment, Run(policy, qps, 0))
        assert result["slo_adherence"] <= result["count_bound"] <= 1


def test_command_prints_hit_rates_only_for_shared_prefixes() -> None:
    def output(*arguments: str) -> str:
        result = CliRunner().invoke(app, ["simulate", "--policy", "fcfs", "--qps", "5", "--duration", "10", *arguments])
        assert result.exit_code == 0, result.stderr
        return result.stdout

    assert "hits" not in output("--workload", "small")
    assert "hits" in output("--workload", "agents")
    (shared,) = json.loads(output("--workload", "multi-turn", "--json"))["runs"]
    (plain,) = json.loads(output("--workload", "small", "--json"))["runs"]
    assert 0.5 < shared["predicted_hit_rate"] <= shared["hit_rate"] < 1
    assert (plain["hit_rate"], plain["predicted_hit_rate"]) == (None, None)
    off = output("--workload", "multi-turn", "--no-prefix-caching", "--no-prefix-index", "--json")
    (uncached,) = json.loads(off)["runs"]
    assert (uncached["hit_rate"], uncached["predicted_hit_rate"]) == (0.0, 0.0)


def test_longer_context_needs_the_limit_of_the_engine_too() -> None:
    arguments = ["simulate", "--workload", "agents", "--max-prompt", "20000", "--qps", "8", "--duration", "60"]
    refused = CliRunner().invoke(app, arguments)
    assert refused.exit_code == 2
    assert CliRunner().invoke(app, [*arguments, "--max-model-len", "32768", "--policy", "fcfs"]).exit_code == 0
