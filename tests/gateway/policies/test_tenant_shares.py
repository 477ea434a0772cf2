"""Tenants share an engine by max-min: what a tenant uses above its share gives way to the others."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest

from benchmarks.isolation.study import ABUSES, adherence
from engine_adapter.engine import EngineState
from engine_adapter.service_kind import ServiceKind
from engine_adapter.step_report import GateReport
from gateway.policies.running_batch import RunningBatch
from gateway.policies.slack.policy import Slack
from gateway.policies.tenant_shares import MAX_TENANTS, MEMORY_S, TenantShares
from gateway.requests.request import Request
from gateway.requests.waiting_queue import WaitingQueue
from gateway.scheduling.admission import AdmissionController
from tests.fixtures.policy_builders import NOW, admitted, decide, engine, make_request, running

BOUND = 0.03
"""How much of its adherence a tenant may lose to another one."""


def above(old: list[Request], waiting: dict[str, float] | None = None, **changes: Any) -> set[str]:
    """Return the tenants above their share. ``old``: the running requests; ``waiting``: weights by tenant."""
    batch = RunningBatch(old, engine(**changes))
    weights = {request.tenant: request.weight for request in old}
    return TenantShares().above(NOW, weights | (waiting or {}), old, batch)[0]


def gated(**changes: Any) -> EngineState:
    """Return an engine that preempts yielding requests."""
    return engine(gate=GateReport(preemptible=True), **changes)


# --- the bound -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["flood", "tight", "prompts"])
def test_tenant_keeps_its_adherence_beside_an_abuser(kind: str) -> None:
    assert adherence(kind, seed=1).victim >= adherence("", seed=1).victim - BOUND


@pytest.mark.study
@pytest.mark.parametrize(("kind", "seed"), list(product(ABUSES, (0, 1))))
def test_tenant_keeps_its_adherence_beside_each_abuse(kind: str, seed: int) -> None:
    assert adherence(kind, seed).victim >= adherence("", seed).victim - BOUND


# --- who is above its share -------------------------------------------------------------------------------------------


def test_share_is_of_what_runs_whatever_was_declared() -> None:
    old = [running(f"a{i}", tenant="a", output=1) for i in range(5)] + [running("b", tenant="b", output=2000)]
    assert above(old) == {"a"}


def test_equal_tenants_are_within_their_shares() -> None:
    assert above([running("a", tenant="a"), running("b", tenant="b")]) == set()


def test_only_tenant_is_within_its_share() -> None:
    assert above([running(str(i), tenant="a") for i in range(9)]) == set()


def test_tenant_that_waits_has_a_share() -> None:
    old = [running(str(i), tenant="a") for i in range(9)]
    assert above(old, {"b": 1.0}) == {"a"}


def test_weight_raises_a_share() -> None:
    old = [running(f"{t}{i}", tenant=t, weight=w) for t, w, n in (("a", 1.0, 2), ("b", 3.0, 3)) for i in range(n)]
    assert above(old) == {"a"}


def test_several_sequences_count_each() -> None:
    assert above([running("one", tenant="a"), running("eight", tenant="b", sequences=8)]) == {"b"}


def test_kv_memory_counts_where_it_is_the_largest_share() -> None:
    old = [running(f"a{i}", tenant="a", prompt=10) for i in range(3)] + [running("b", tenant="b", prompt=5000)]
    assert above(old) == {"a"}, "the cost of the context is small"
    assert above(old, kv_tokens=6000) == {"b"}


def test_slots_count_where_they_are_the_largest_share() -> None:
    # Two requests of one token each take less time than a long one, but more slots.
    old = [running(f"a{i}", tenant="a", prompt=1, tpot=1.0) for i in range(2)]
    old.append(running("b", tenant="b", prompt=200_000, tpot=1.0))
    assert above(old) == {"b"}
    assert above(old, max_num_seqs=2) == {"a"}


def test_strict_pace_counts_as_use_of_the_engine() -> None:
    # An engine whose fastest step takes 10 ms.
    old = [running("strict", tenant="a", tpot=0.015), *(running(f"b{i}", tenant="b", tpot=0.05) for i in range(3))]
    assert above(old) == {"a"}
    assert above([running("strict", tenant="a", tpot=0.04), *old[1:]]) == {"b"}


def test_prompts_of_late_count_and_fade() -> None:
    shares, batch = TenantShares(), RunningBatch([], engine())
    shares.note(NOW, [make_request(tenant="a", prompt=2000)], 1e-3)
    shares.note(NOW, [make_request(tenant="b", prompt=10)], 1e-3)
    above, others = shares.above(NOW, {}, [], batch)
    assert above == {"a"}
    assert others == pytest.approx(0.01 / MEMORY_S)
    assert shares.above(NOW + MEMORY_S, {}, [], batch)[1] < others / 2


def test_idle_tenant_is_forgotten_so_the_other_may_use_everything() -> None:
    shares = TenantShares()
    shares.note(NOW, [make_request(tenant="a"), make_request(tenant="b")], 1e-3)
    assert shares.several(NOW + MEMORY_S, {})
    shares.note(NOW + MEMORY_S, [make_request(tenant="a")], 1e-3)
    assert not shares.several(NOW + MEMORY_S + 0.1, {"a": 1.0})
    assert shares.several(NOW + MEMORY_S + 0.1, {"b": 1.0})


def test_most_recent_tenants_are_remembered() -> None:
    shares = TenantShares()
    shares.note(NOW, [make_request(tenant=str(i)) for i in range(MAX_TENANTS + 5)], 1e-3)
    assert len(shares._recent) == MAX_TENANTS


# --- what happens to a tenant above its share -------------------------------------------------------------------------


def test_request_of_a_tenant_above_its_share_yields() -> None:
    old = [running(f"old{i}", tpot=0.05, tenant="flood") for i in range(4)]
    waiting = [make_request(name, ttft=5.0, tpot=0.05, tenant=name, prompt=10) for name in ("flood", "victim")]
    decision = decide(Slack(), NOW, waiting, old, gated())
    assert admitted(decision) == ["victim", "flood"]
    assert decision.yielding == {"flood"}


def test_tenant_within_its_share_takes_a_slot_of_a_yielding_request() -> None:
    old = [running(f"old{i}", tpot=0.05, tenant="flood") for i in range(8)]
    waiting = [make_request(name, ttft=1.0, tpot=0.05, tenant=name) for name in ("flood", "victim")]
    assert admitted(decide(Slack(), NOW, waiting, old, gated(max_num_seqs=8))) == []
    for request in old:
        request.kind = ServiceKind.YIELDING
    assert admitted(decide(Slack(), NOW, waiting, old, gated(max_num_seqs=8))) == ["victim"]
    assert admitted(decide(Slack(), NOW, waiting, old, engine(max_num_seqs=8))) == [], "without preemption"


def test_tenant_within_its_share_takes_kv_memory_of_yielding_requests() -> None:
    # The abuser declared one token each, and the answers are long.
    old = [running(f"old{i}", tpot=0.05, tenant="flood", output=1, generated=900) for i in range(8)]
    for request in old:
        request.kind = ServiceKind.YIELDING
    victim = make_request("victim", ttft=1.0, tpot=0.05, tenant="victim", output=500, prompt=500)
    assert admitted(decide(Slack(), NOW, [victim], old, gated(kv_tokens=8500, max_num_seqs=16))) == ["victim"]
    assert admitted(decide(Slack(), NOW, [victim], old, engine(kv_tokens=8500, max_num_seqs=16))) == []


def test_pace_of_yielding_requests_does_not_limit_the_others() -> None:
    # A step takes 10 ms, so a pace of 11 ms leaves no time for prompts.
    old = [running(f"old{i}", tpot=0.011, tenant="flood") for i in range(5)]
    victim = make_request("victim", ttft=0.5, tpot=0.05, tenant="victim", prompt=200)
    assert admitted(decide(Slack(), NOW, [victim], old, gated())) == []
    for request in old:
        request.kind = ServiceKind.YIELDING
    assert admitted(decide(Slack(), NOW, [victim], old, gated())) == ["victim"]


def test_yielding_requests_keep_their_pace_among_each_other() -> None:
    old = [running(f"old{i}", tpot=0.0115, tenant="flood") for i in range(14)]
    for request in old:
        request.kind = ServiceKind.YIELDING
    waiting = [make_request("flood", ttft=9.0, tpot=0.05, tenant="flood"), make_request("other", ttft=9.0, tenant="b")]
    assert admitted(decide(Slack(), NOW, waiting, old, gated())) == ["other"]


def test_admission_marks_yielding_requests_and_a_new_wait_clears_the_mark() -> None:
    controller = AdmissionController(Slack(), gated())
    controller.running = {r.id: r for r in [running(f"old{i}", tpot=0.05, tenant="flood") for i in range(4)]}
    requests = [make_request(name, ttft=5.0, tpot=0.05, tenant=name, prompt=10) for name in ("flood", "victim")]
    for request in requests:
        controller.submit(request)
    controller.decide(NOW)
    assert [request.kind for request in requests] == [ServiceKind.YIELDING, ServiceKind.PACED]
    requests[0].wait_again()
    assert requests[0].kind is ServiceKind.PACED


# --- full queues ------------------------------------------------------------------------------------------------------


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
