"""Simulation of several gateways, each with a share of the engines."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from dataclasses import replace
from itertools import pairwise

import pytest
from typer.testing import CliRunner

from gateway.policies.registry import make_policy
from gateway.requests.request import Request
from gateway.requests.slo import Slo
from gateway.scheduling.shards import owners
from lab.cli import app
from lab.simulate.fleet import ShardedFleet
from lab.simulate.lifecycle import Changes
from lab.simulate.replica import Replica
from lab.workload import make_workload
from tests.fixtures.simulations import HAND, run


def fleet(gateways: int, engines: int, seed: int = 0) -> tuple[ShardedFleet, list[Replica]]:
    replicas = [Replica(HAND, make_policy("slack")) for _ in range(engines)]
    return ShardedFleet(replicas, "round_robin", lambda: 0.0, gateways, 1000, seed), replicas


def placed(gateways: int, engines: int, seed: int = 0) -> list[int]:
    """Return the number of the engine of each of 1,000 requests."""
    behind, replicas = fleet(gateways, engines, seed)
    requests = (Request(str(n), "1", 0.0, Slo(), prompt_tokens=10, predicted_tokens=10) for n in range(1000))
    return [replicas.index(behind.place(request)) for request in requests]


def test_requests_are_spread_over_gateways_and_their_engines() -> None:
    engines = placed(4, 8)
    shards = owners(map(str, range(8)), 4)
    per_gateway = Counter(shards[str(number)] for number in engines)
    assert all(200 < per_gateway[gateway] < 300 for gateway in range(4))
    by_gateway: defaultdict[int, list[int]] = defaultdict(list)
    for number in engines:
        by_gateway[shards[str(number)]].append(number)
    for numbers in by_gateway.values():
        # Round robin within the share: each gateway knows its own requests only.
        assert len(set(numbers)) == 2
        assert all(one != other for one, other in pairwise(numbers))


def test_spread_depends_on_the_seed_only() -> None:
    assert placed(4, 8) == placed(4, 8)
    assert placed(4, 8) != placed(4, 8, seed=1)


def test_more_gateways_than_engines_are_refused() -> None:
    with pytest.raises(ValueError, match="3 gateways cannot divide 2 engines"):
        fleet(3, 2)


@pytest.mark.parametrize("gateways", [2, 4])
def test_every_request_ends_once_behind_several_gateways(gateways: int) -> None:
    workload = make_workload("small", qps=200, requests=120, seed=5)
    result = run(workload, "slack", replicas=4, gateways=gateways, routing="headroom")
    again = run(workload, "slack", replicas=4, gateways=gateways, routing="headroom")
    assert [one.request for one in result.results] == workload
    assert replace(result, scheduling_s=0, routing_s=0) == replace(again, scheduling_s=0, routing_s=0)


def test_requests_of_a_failed_engine_stay_with_their_gateway() -> None:
    workload = make_workload("small", qps=200, requests=120, seed=5)
    result = run(workload, "slack", replicas=4, gateways=2, changes=Changes(((0.2, 1),), cold_start_s=0.5))
    assert len(result.results) == len(workload)
    assert {one.outcome for one in result.results} <= {"finished", "rejected", "failed"}


def test_command_simulates_gateways() -> None:
    arguments = ["simulate", "--workload", "small", "--qps", "60", "--duration", "2", "--policy", "slack", "--json"]
    arguments += ["--replicas", "4"]
    whole, divided = (
        json.loads(CliRunner().invoke(app, [*arguments, "--gateways", count]).stdout)["runs"][0] for count in "14"
    )
    assert whole["requests"] == divided["requests"]
    assert whole["steps"] != divided["steps"]
