"""Several step gates in one engine."""

from __future__ import annotations

import pytest

from engine_adapter.gates.composite import GATES, Gates
from engine_adapter.step_report import StepReport
from tests.fixtures.decoding import DecodingRequest, best_effort


def test_gates_apply_the_gate_that_each_request_names() -> None:
    gates = Gates("open")
    credit = [DecodingRequest("a", 0.03, gate="credit"), DecodingRequest("b", 0.06, gate="credit")]
    default = [DecodingRequest("c", 0.5), DecodingRequest("d", 0.9, gate="no such gate")]
    sat_out = [gates.plan(0.1 * step, [*credit, *default], 0).sit_out for step in range(4)]
    assert sat_out == [{"b"}, set(), {"b"}, set()]


def test_gates_forget_requests_in_every_gate() -> None:
    gates = Gates("credit")
    decoding = [DecodingRequest("a", 0.03), DecodingRequest("b", 0.06)]
    for _ in range(3):
        assert gates.plan(0.0, decoding, 0).sit_out == {"b"}
        gates.forget("b")


def test_gates_apply_the_smallest_prefill_limit() -> None:
    gates = Gates("open")
    mixed = [DecodingRequest("a", 0.03, gate="slack"), DecodingRequest("b", 0.06, gate="credit")]
    alone = Gates("slack").plan(0.0, mixed[:1], 10_000).max_prefill_tokens
    assert alone is not None
    assert gates.plan(0.0, mixed, 10_000).max_prefill_tokens == alone < 10_000


def test_gates_ask_the_requests_gate_whether_it_is_preemptible() -> None:
    request, gates = best_effort("b"), Gates("credit")
    assert not gates.preemptible(request)
    request.gate = "slack"
    assert gates.preemptible(request)


def test_gate_created_late_learns_from_earlier_steps() -> None:
    gates = Gates("open")
    gates.plan(0.0, [DecodingRequest("a")], 0)
    for batch in range(1, 65):
        gates.observe(StepReport(batch % 16 + 1, 0, 100.0, 0.5))
        gates.observe(StepReport(batch % 16 + 1, 50, 100.0, 0.6))
    plan = gates.plan(1.0, [DecodingRequest("b", 0.1, gate="slack")], 1000)
    assert plan.max_prefill_tokens == 0, "steps take half a second: a pace of 0.1 s leaves no slack"


def test_unknown_default_gate_error_lists_the_gates() -> None:
    assert set(GATES) == {"open", "credit", "slack"}
    with pytest.raises(ValueError, match=r"'best' is not a step gate; choose one of open, credit, slack"):
        Gates("best")
