"""benchmarks.overhead.decision_cost: every policy, gate and shadow is measured. The measured times are not checked."""

from __future__ import annotations

import json

import pytest
import typer
from typer.testing import CliRunner

from benchmarks.overhead import decision_cost
from engine_adapter.gates.composite import GATES
from engine_adapter.step_time.profile import load_profile
from gateway.policies.registry import POLICIES
from lab.workload import make_workload

WORKLOAD = make_workload("small", qps=1.0, requests=50, seed=0)


def test_command_times_every_policy_gate_and_shadow() -> None:
    app = typer.Typer()
    app.command()(decision_cost.main)
    result = CliRunner().invoke(app, ["--waiting", "12", "--running", "6", "--repeats", "2", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    costs = found["costs"]
    timed = {(row["what"], row["name"], row["case"]) for row in costs}
    queueing = set(POLICIES) - set(decision_cost.NO_QUEUE)
    assert timed >= {("decide", name, case) for name in queueing for case in ("full", "turnover")}
    assert timed >= {("decide", name, "burst") for name in decision_cost.NO_QUEUE}
    assert timed >= {("gate", name, case) for name in GATES for case in ("plan", "observe")}
    assert {name for what, name, _ in timed if what == "shadow"} == {"none", "scorpio", "scorpio and mooncake"}
    with_quantiles = [row for row in costs if "mean_us" not in row]
    assert all(0 <= row["p50_us"] <= row["p99_us"] <= row["max_us"] for row in with_quantiles)
    assert decision_cost.table(costs).row_count == len(with_quantiles)
    lines = decision_cost.page(found).splitlines()
    assert sum(line.startswith(("| decide |", "| gate |", "| shadow |")) for line in lines) == len(costs)


@pytest.mark.parametrize("policy", sorted(set(POLICIES) - set(decision_cost.NO_QUEUE)))
def test_full_case_keeps_waiting_and_running_requests(policy: str) -> None:
    profile = load_profile("a100-llama3.1-8b")
    controller = decision_cost.loaded_controller(policy, profile, WORKLOAD, waiting=40, running=8)
    for _ in range(3):
        decision = controller.decide(decision_cost.NOW)
        assert (decision.admit, decision.reject) == ([], [])
    assert (len(controller.waiting), len(controller.running)) == (40, 8)


def test_summary_is_in_microseconds() -> None:
    assert decision_cost.summary([1e-6] * 98 + [3e-6, 5e-6]) == {"p50_us": 1.0, "p99_us": 5.0, "max_us": 5.0}
