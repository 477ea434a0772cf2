"""Engines that fail, start and stop during a simulation."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from typer.testing import CliRunner

from engine_adapter.step_time.profile import load_profile
from gateway.cli import app
from gateway.policies.registry import make_policy
from lab.simulate.lifecycle import ENGINE_LOST, Changes, FleetLoad
from lab.simulate.predictions import predict
from lab.simulate.simulator import SimulationResult, simulate
from lab.workload import make_workload


def _run(
    changes: Changes, replicas: int = 2, qps: float = 20.0, policy: str = "slack", **more: Any
) -> SimulationResult:
    workload = make_workload("sharegpt", qps=qps, duration_s=30, seed=1)
    return simulate(
        workload,
        predict("shipped", workload, 1),
        load_profile("a100-llama3.1-8b"),
        lambda: make_policy(policy, {}),
        replicas=replicas,
        changes=changes,
        **more,
    )


class _ScriptedScaler:
    """Wants the numbers of ``wanted``, one each time it is asked, and the last one from then on."""

    interval_s = 5.0

    def __init__(self, *wanted: int) -> None:
        self.wanted = list(wanted)
        self.seen: list[FleetLoad] = []

    def replicas(self, load: FleetLoad) -> int:
        """Return the next number."""
        self.seen.append(load)
        return self.wanted.pop(0) if len(self.wanted) > 1 else self.wanted[0]


def test_engine_that_dies_fails_only_the_answers_that_it_had_begun() -> None:
    result = _run(Changes(failures=((10.0, 0),), cold_start_s=5.0))

    failed = [r for r in result.results if r.outcome == "failed"]
    assert 0 < len(failed) < 60
    assert {r.reason for r in failed} == {ENGINE_LOST}
    assert all(r.request.at_s < 10 for r in failed)
    assert len(result.results) == len(make_workload("sharegpt", qps=20, duration_s=30, seed=1))
    assert all(r.outcome in ("finished", "rejected", "failed") for r in result.results)


@pytest.mark.parametrize("policy", ["slack", "fcfs", "scorpio"])
def test_only_engine_that_dies_serves_again_after_its_cold_start(policy: str) -> None:
    result = _run(Changes(failures=((10.0, 0), (20.0, 0)), cold_start_s=2.0), replicas=1, qps=8, policy=policy)

    late = [r for r in result.results if r.request.at_s > 24]
    assert sum(r.outcome == "finished" for r in late) > 0.9 * len(late)


def test_failure_of_a_starting_engine_changes_nothing() -> None:
    once = _run(Changes(failures=((10.0, 1),), cold_start_s=5.0))
    twice = _run(Changes(failures=((10.0, 1), (12.0, 1)), cold_start_s=5.0))

    assert [r.outcome for r in once.results] == [r.outcome for r in twice.results]


@pytest.mark.parametrize("failure", [(1.0, 2), (1.0, -1), (-1.0, 0), (float("nan"), 0)])
def test_failure_of_an_unknown_engine_is_refused(failure: tuple[float, int]) -> None:
    with pytest.raises(ValueError, match="one of the engines 0 to 1"):
        _run(Changes(failures=(failure,)))


def test_command_simulates_failures() -> None:
    arguments = ["simulate", "--policy", "slack", "--qps", "20", "--duration", "20", "--replicas", "2", "--json"]

    run = CliRunner().invoke(app, [*arguments, "--fail", "5:1", "--cold-start", "3"])

    assert run.exit_code == 0, run.output
    record = json.loads(run.stdout)["runs"][0]
    assert 0 < record["failed"] < 0.3


@pytest.mark.parametrize("text", ["soon", "1:2:3", "1:x", ""])
def test_command_says_how_to_write_a_failure(text: str) -> None:
    run = CliRunner().invoke(app, ["simulate", "--fail", text])

    assert run.exit_code == 2
    assert "SECONDS:REPLICA" in run.output


def test_engines_start_cold_and_drain_without_losing_a_request() -> None:
    scaler = _ScriptedScaler(1, 3, 3, 3, 1)
    result = _run(Changes(cold_start_s=7.0, autoscaler=scaler, initial=1), replicas=3)

    assert [(load.serving, load.starting) for load in scaler.seen[:5]] == [(1, 0), (1, 0), (1, 2), (3, 0), (3, 0)]
    assert (scaler.seen[5].serving, scaler.seen[5].starting) == (1, 0)
    assert {r.outcome for r in result.results} <= {"finished", "rejected"}
    # Two more engines were in use from 5 s until they had drained, some seconds after 20 s.
    assert 2 * 15 < result.gpu_s - result.duration_s < 2 * 40
    assert max(size for _, size in result.sizes) == 3


def test_engine_that_begins_to_serve_takes_requests_that_wait_for_others() -> None:
    """All arrive within 2 s, and `s3` lets them wait for memory. The second engine serves after 6 s."""
    workload = make_workload("sharegpt", qps=400, duration_s=2, seed=1)
    profile = replace(load_profile("a100-llama3.1-8b"), max_num_seqs=32)

    def duration_s(initial: int) -> float:
        changes = Changes(cold_start_s=1.0, autoscaler=_ScriptedScaler(initial, 2), initial=initial)
        predictions = predict("shipped", workload, 1)
        return simulate(
            workload, predictions, profile, lambda: make_policy("s3", {}), replicas=2, changes=changes
        ).duration_s

    # 1.64 times as long if only new requests reached it, and there are none.
    assert duration_s(1) < 1.5 * duration_s(2)


def test_fleet_never_loses_its_last_engine_or_grows_beyond_its_replicas() -> None:
    scaler = _ScriptedScaler(0, 99, 0)
    result = _run(Changes(cold_start_s=1.0, autoscaler=scaler, initial=0), replicas=2)

    assert min(load.serving for load in scaler.seen) == 1
    assert max(load.serving + load.starting for load in scaler.seen) == 2
    assert len(result.results) > 0


def test_gpu_time_without_changes_is_that_of_all_engines() -> None:
    workload = make_workload("sharegpt", qps=5, requests=10)
    result = simulate(
        workload, predict("oracle", workload, 0), load_profile("a100-llama3.1-8b"), lambda: make_policy("fcfs", {}),
        replicas=3,
    )  # fmt: skip

    assert result.gpu_s == pytest.approx(3 * result.duration_s)
