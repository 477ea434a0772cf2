"""The credit gate: each request decodes in its TRP's share of the steps."""

from __future__ import annotations

from math import floor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine_adapter.gates.base import OpenGate
from engine_adapter.gates.composite import GATES
from engine_adapter.gates.credit import CreditGate
from tests.fixtures.decoding import DecodingRequest, best_effort, deadline_only


def batch(*paces_ms: float | None) -> list[DecodingRequest]:
    """Requests "r0", "r1", ... with these paces."""
    return [DecodingRequest(f"r{i}", None if ms is None else ms / 1000) for i, ms in enumerate(paces_ms)]


def decoded_steps(gate: CreditGate, decoding: list[DecodingRequest], steps: int) -> dict[str, int]:
    """Number of steps, of the next ``steps``, in which each request decodes."""
    counts = dict.fromkeys((r.request_id for r in decoding), 0)
    for _ in range(steps):
        sit_out = gate.plan(0.0, decoding, 0).sit_out
        for request in decoding:
            counts[request.request_id] += request.request_id not in sit_out
    return counts


def trp(request: DecodingRequest, decoding: list[DecodingRequest]) -> float:
    """P_min / P_i; 1 without a pace."""
    if request.pace_s is None:
        return 1.0
    return min(r.pace_s for r in decoding if r.pace_s is not None) / request.pace_s


PACES_MS = st.lists(st.one_of(st.none(), st.floats(5, 500)), min_size=1, max_size=12)


@settings(max_examples=80, deadline=None)
@given(PACES_MS, st.integers(1, 400))
def test_credit_gate_share_of_steps_is_trp_within_one_step(paces_ms: list[float | None], steps: int) -> None:
    decoding = batch(*paces_ms)
    counts = decoded_steps(CreditGate(), decoding, steps)
    for request in decoding:
        assert abs(counts[request.request_id] / steps - trp(request, decoding)) <= 1 / steps + 1e-6


@settings(max_examples=40, deadline=None)
@given(PACES_MS, st.integers(1, 60))
def test_credit_gate_strictest_and_unpaced_never_sit_out(paces_ms: list[float | None], steps: int) -> None:
    decoding = batch(*paces_ms)
    counts = decoded_steps(CreditGate(), decoding, steps)
    assert all(counts[r.request_id] == steps for r in decoding if trp(r, decoding) == 1)


def test_credit_gate_requests_without_pace_never_sit_out() -> None:
    decoding = [*batch(10, 20), deadline_only("deadline-only"), best_effort("best-effort")]
    counts = decoded_steps(CreditGate(), decoding, 40)
    assert counts == {"r0": 40, "r1": 20, "deadline-only": 40, "best-effort": 40}


def test_credit_gate_pace_above_one_second_has_its_share() -> None:
    assert decoded_steps(CreditGate(), batch(500, 2000), 40) == {"r0": 40, "r1": 10}


@given(st.integers(1, 40))
def test_credit_gate_meets_integer_ratios_exactly(ratio: int) -> None:
    decoding = batch(10, 10 * ratio)
    assert decoded_steps(CreditGate(), decoding, 5 * ratio)["r1"] == 5


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(PACES_MS, st.integers(1, 30)), min_size=1, max_size=6), st.integers(1, 40))
def test_credit_gate_keeps_less_than_one_step_of_credit(
    phases: list[tuple[list[float | None], int]], ratio: int
) -> None:
    gate = CreditGate()
    for paces_ms, steps in phases:
        decoded_steps(gate, batch(*paces_ms), steps)
    # A credit in [0, 1) decodes at most one step earlier than no credit, and never two steps in a row.
    decoding = [DecodingRequest("strict", 0.001), *(DecodingRequest(f"r{i}", 0.001 * ratio) for i in range(12))]
    counts = decoded_steps(gate, decoding, 3 * ratio)
    assert all(3 <= count <= 4 for name, count in counts.items() if name != "strict" and ratio > 1)


def test_credit_gate_shares_follow_when_the_strictest_leaves() -> None:
    gate, (strict, middle, loose) = CreditGate(), batch(10, 20, 40)
    assert decoded_steps(gate, [strict, middle, loose], 40) == {"r0": 40, "r1": 20, "r2": 10}
    gate.forget(strict.request_id)
    after = decoded_steps(gate, [middle, loose], 40)
    assert after["r1"] == 40
    assert after["r2"] == pytest.approx(20, abs=1)


def test_credit_gate_looser_arrival_changes_no_share() -> None:
    gate, decoding = CreditGate(), batch(10, 30)
    decoded_steps(gate, decoding, 30)
    counts = decoded_steps(gate, [*decoding, DecodingRequest("new", 0.015)], 30)
    assert counts["r1"] == 10
    assert counts["new"] == 20


def test_credit_gate_forgotten_request_starts_without_credit() -> None:
    gate, decoding = CreditGate(), batch(10, 20)
    assert gate.plan(0.0, decoding, 0).sit_out == {"r1"}
    gate.forget("r1")
    assert gate.plan(0.0, decoding, 0).sit_out == {"r1"}, "its half credit is gone"
    assert gate.plan(0.0, decoding, 0).sit_out == set()
    gate.forget("never seen")


@given(PACES_MS)
def test_credit_gate_first_k_steps_decode_floor_of_k_times_trp(paces_ms: list[float | None]) -> None:
    decoding = batch(*paces_ms)
    counts = decoded_steps(CreditGate(), decoding, 17)
    for request in decoding:
        share = 17 * trp(request, decoding)
        assert floor(share - 1e-6) <= counts[request.request_id] <= floor(share + 1e-6)


def test_only_slack_gate_limits_prefill() -> None:
    limits = {name: gate().plan(0.0, batch(10, 20), 5000).max_prefill_tokens for name, gate in GATES.items()}
    assert limits == {"open": None, "credit": None, "slack": 0}


def test_only_slack_gate_preempts_and_only_best_effort_requests() -> None:
    requests = [best_effort("b"), best_effort("waived", 0.03), deadline_only("d"), DecodingRequest("p")]
    preemptible = {name: [r.request_id for r in requests if gate().preemptible(r)] for name, gate in GATES.items()}
    assert preemptible == {"open": [], "credit": [], "slack": ["b", "waived"]}


def test_open_gate_excludes_no_request() -> None:
    gate = OpenGate()
    assert all(not gate.plan(0.0, batch(10, 100, None), 0).sit_out for _ in range(20))
    gate.forget("r0")
