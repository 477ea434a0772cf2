"""What scheduling costs is told of the objects that serve, in every case, at any size; how much it is, nobody asks."""

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

ASKED = make_workload("small", qps=1.0, requests=50, seed=0)


def test_every_policy_gate_and_shadow_is_timed() -> None:
    app = typer.Typer()
    app.command()(decision_cost.main)
    done = CliRunner().invoke(app, ["--waiting", "12", "--running", "6", "--repeats", "2", "--json"])
    assert done.exit_code == 0, done.output
    costs = json.loads(done.stdout)["costs"]
    timed = {(row["what"], row["name"], row["case"]) for row in costs}
    waits = set(POLICIES) - set(decision_cost.LET_NOBODY_WAIT)
    assert timed >= {("decide", name, case) for name in waits for case in ("full", "turnover")}
    assert timed >= {("decide", name, "burst") for name in decision_cost.LET_NOBODY_WAIT}
    assert timed >= {("gate", name, case) for name in GATES for case in ("plan", "observe")}
    assert {name for what, name, _ in timed if what == "shadow"} == {"none", "scorpio", "scorpio and mooncake"}
    figures = [row for row in costs if "mean_us" not in row]
    assert all(0 <= row["p50_us"] <= row["p99_us"] <= row["max_us"] for row in figures)
    assert decision_cost.table(costs).row_count == len(figures)
    told = decision_cost.page(json.loads(done.stdout))
    assert sum(line.startswith(("| decide |", "| gate |", "| shadow |")) for line in told.splitlines()) == len(costs)


@pytest.mark.parametrize("policy", sorted(set(POLICIES) - set(decision_cost.LET_NOBODY_WAIT)))
def test_as_many_wait_at_the_last_decision_as_at_the_first(policy: str) -> None:
    profile = load_profile("a100-llama3.1-8b")
    books = decision_cost._books(policy, profile, ASKED, waiting=40, running=8)
    for _ in range(3):
        decision = books.decide(decision_cost.NOW)
        assert (decision.admit, decision.reject) == ([], [])
    assert (len(books.waiting), len(books.running)) == (40, 8)


def test_a_summary_is_in_microseconds() -> None:
    assert decision_cost.summary([1e-6] * 98 + [3e-6, 5e-6]) == {"p50_us": 1.0, "p99_us": 5.0, "max_us": 5.0}
