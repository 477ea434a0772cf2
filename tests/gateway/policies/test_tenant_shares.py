"""Tenants share an engine by weighted max-min: what a tenant offers does not raise its share."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.isolation.study import ABUSES, adherence
from gateway.policies.slack.policy import Slack
from gateway.policies.tenant_shares import MEMORY_S, RecentTenants, TenantShares
from gateway.requests.request import Request
from gateway.requests.waiting_queue import WaitingQueue
from tests.fixtures.policy_builders import NOW, admitted, decide, engine, make_request, running


def shares_of(waiting: list[Request], old: list[Request]) -> TenantShares:
    return TenantShares.between(NOW, waiting, old, RecentTenants(), 1e-3, 0.0, 0.05)


@pytest.mark.parametrize("kind", ["flood", "class", "loose"])
def test_flooding_tenant_leaves_its_neighbour_its_adherence(kind: str) -> None:
    assert kind in ABUSES
    assert adherence(kind, seed=1) > 0.9


def test_tenant_above_its_share_waits_for_the_other() -> None:
    old = [running(f"old{i}", tpot=0.05, tenant="flood") for i in range(8)]
    waiting = [make_request(f"f{i}", ttft=1.0, tpot=0.05, tenant="flood") for i in range(3)]
    waiting.append(make_request("victim", ttft=5.0, tpot=0.05, tenant="victim"))
    assert admitted(decide(Slack(), NOW, waiting, old, engine(max_num_seqs=9))) == ["victim"]


def test_weight_raises_a_share() -> None:
    old = [running(f"{t}{i}", tenant=t, weight=w) for t, w, n in (("a", 1.0, 2), ("b", 3.0, 3)) for i in range(n)]
    waiting = [make_request("wa", tenant="a"), make_request("wb", tenant="b", weight=3.0)]
    shares = shares_of(waiting, old)
    assert shares.above().tolist() == [True, False]


def test_several_sequences_count_each() -> None:
    old = [running("one", tenant="a"), running("eight", tenant="b", sequences=8)]
    assert shares_of([make_request(tenant="a"), make_request(tenant="b")], old).above().tolist() == [False, True]


def test_tenants_take_turns_by_usage() -> None:
    waiting = [make_request(f"a{i}", tenant="a") for i in range(3)] + [
        make_request(f"b{i}", tenant="b") for i in (0, 1)
    ]
    order = shares_of(waiting, []).merge(np.arange(5), np.ones(5))
    assert [waiting[at].id for at in order] == ["a0", "b0", "a1", "b1", "a2"]


def test_idle_tenant_is_forgotten_so_the_other_may_use_everything() -> None:
    recent = RecentTenants()
    recent.note(NOW, [make_request(tenant="a"), make_request(tenant="b")], 1e-3)
    assert recent.several(NOW + MEMORY_S)
    recent.note(NOW + MEMORY_S, [make_request(tenant="a")], 1e-3)
    assert not recent.several(NOW + MEMORY_S + 0.1)


def test_full_class_displaces_the_newest_of_the_tenant_with_most() -> None:
    queue = WaitingQueue(lambda request: (request.arrival_s,))
    for number in range(4):
        queue.add(make_request(f"f{number}", tenant="flood"))
    loser = queue.displaced_by(make_request("v", tenant="victim"))
    assert loser is not None
    assert loser.id == "f3"
    assert queue.displaced_by(make_request("f4", tenant="flood")) is None


def test_full_class_of_equal_tenants_displaces_none() -> None:
    queue = WaitingQueue(lambda request: (request.arrival_s,))
    for tenant in "ab":
        queue.add(make_request(tenant, tenant=tenant))
    assert queue.displaced_by(make_request("a2", tenant="a")) is None
    heavy = queue.displaced_by(make_request("a3", tenant="a", weight=4.0))
    assert heavy is not None
    assert heavy.tenant == "b"
