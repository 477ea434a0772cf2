from __future__ import annotations

from dataclasses import dataclass
from math import floor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine_adapter.gates.base import CreditGate, OpenGate
from engine_adapter.gates.composite import GATES


@dataclass(frozen=True)
class Running:
    request_id: str
    tpot_slo_s: float | None
    length: int = 100
    gate: str = ""


def batch(*bounds_ms: float | None) -> list[Running]:
    return [Running(f"r{i}", None if ms is None else ms / 1000) for i, ms in enumerate(bounds_ms)]


def batched(gate: CreditGate, running: list[Running], steps: int) -> dict[str, int]:
    counts = dict.fromkeys((r.request_id for r in running), 0)
    for _ in range(steps):
        sit_out = gate.plan(0.0, running, 0).sit_out
        for request in running:
            counts[request.request_id] += request.request_id not in sit_out
    return counts


bounds = st.lists(st.one_of(st.none(), st.floats(5, 500)), min_size=1, max_size=12)


@settings(max_examples=80, deadline=None)
@given(bounds, st.integers(1, 400))
def test_a_requests_share_of_steps_is_its_trp_to_within_one_step(mix: list[float | None], steps: int) -> None:
    running = batch(*mix)
    strictest = min((r.tpot_slo_s for r in running if r.tpot_slo_s is not None), default=0.0)
    for request, count in zip(running, batched(CreditGate(), running, steps).values(), strict=True):
        trp = 1.0 if request.tpot_slo_s is None else strictest / request.tpot_slo_s
        assert abs(count / steps - trp) <= 1 / steps + 1e-6


@settings(max_examples=40, deadline=None)
@given(bounds, st.integers(1, 60))
def test_the_strictest_and_the_unbounded_never_sit_out(mix: list[float | None], steps: int) -> None:
    running = batch(*mix)
    strictest = min((r.tpot_slo_s for r in running if r.tpot_slo_s is not None), default=None)
    counts = batched(CreditGate(), running, steps)
    free = [r.request_id for r in running if r.tpot_slo_s is None or r.tpot_slo_s == strictest]
    assert all(counts[request_id] == steps for request_id in free)


@given(st.integers(1, 40))
def test_whole_ratios_are_met_exactly_in_spite_of_rounding(ratio: int) -> None:
    running = batch(10, 10 * ratio)
    assert batched(CreditGate(), running, 5 * ratio)["r1"] == 5


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(bounds, st.integers(1, 30)), min_size=1, max_size=6))
def test_credits_stay_between_zero_and_one_while_membership_changes(
    phases: list[tuple[list[float | None], int]],
) -> None:
    gate = CreditGate()
    for mix, steps in phases:
        batched(gate, batch(*mix), steps)
        assert all(-1e-6 <= credit <= 1.0 for credit in gate._credit.values())


def test_shares_follow_when_the_strictest_leaves() -> None:
    gate, (strict, middle, loose) = CreditGate(), batch(10, 20, 40)
    assert batched(gate, [strict, middle, loose], 40) == {"r0": 40, "r1": 20, "r2": 10}
    gate.forget(strict.request_id)
    after = batched(gate, [middle, loose], 40)
    assert after["r1"] == 40
    assert after["r2"] == pytest.approx(20, abs=1)


def test_a_newcomer_changes_nobodys_share_unless_it_is_the_strictest() -> None:
    gate, running = CreditGate(), batch(10, 30)
    batched(gate, running, 30)
    counts = batched(gate, [*running, Running("new", 0.015)], 30)
    assert counts["r1"] == 10
    assert counts["new"] == 20


def test_a_forgotten_request_starts_again_without_credit() -> None:
    gate, running = CreditGate(), batch(10, 20)
    assert gate.plan(0.0, running, 0).sit_out == {"r1"}
    gate.forget("r1")
    assert gate.plan(0.0, running, 0).sit_out == {"r1"}, "its half credit is gone"
    assert gate.plan(0.0, running, 0).sit_out == set()
    gate.forget("r1")
    gate.forget("never seen")
    assert gate._credit == {}


@given(bounds)
def test_the_first_k_steps_batch_the_floor_of_k_times_trp(mix: list[float | None]) -> None:
    running = batch(*mix)
    strictest = min((r.tpot_slo_s for r in running if r.tpot_slo_s is not None), default=0.0)
    counts = batched(CreditGate(), running, 17)
    for request in running:
        if request.tpot_slo_s is not None:
            share = 17 * strictest / request.tpot_slo_s
            assert floor(share - 1e-6) <= counts[request.request_id] <= floor(share + 1e-6)


def test_only_the_slack_gate_limits_prefill() -> None:
    limits = {name: gate().plan(0.0, batch(10, 20), 5000).max_prefill_tokens for name, gate in GATES.items()}
    assert limits == {"open": None, "credit": None, "slack": 0}


def test_the_open_gate_lets_everyone_through() -> None:
    gate = OpenGate()
    assert all(not gate.plan(0.0, batch(10, 100, None), 0).sit_out for _ in range(20))
    gate.forget("r0")
