"""benchmarks.scale.report_channel: the cost of a report, the checks, and its page."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.scale import report_channel, report_page
from benchmarks.scale.report_cost import message_cost

RECORD: dict[str, Any] = {
    "arm": "without", "round": 0, "paced": 4, "served": 4, "rejected": 0, "ttft_s": [0.2, 3.0, 4.0, 9.0], "soon": 1,
    "ttft_p50_s": 3.5, "ttft_p99_s": 9.0, "preemptions": 0, "tokens_per_s": 100.0, "batch_clients_failed": [],
}  # fmt: skip
WITH: dict[str, Any] = {**RECORD, "arm": "with", "ttft_s": [0.1, 0.1, 0.1, 0.2], "soon": 4, "preemptions": 3}
COST: dict[str, Any] = {
    "step_ms": 20, "steps": 100, "reports": 40, "received_steps": 100, "dropped": 0, "engine_us": 20.0,
    "sender_us": 30.0, "gateway_us": 100.0, "bytes": 150.0, "bytes_per_s": 7500,
}  # fmt: skip


def document(**changes: Any) -> dict[str, Any]:
    return {
        "seed": 0, "rounds": 1, "round_s": 3.0, "cpus": 2, "slots": 8, "batch_clients": 12, "batch_tokens": [300, 900],
        "paced_every_s": 0.7, "paced_tokens": 8, "soon_s": 1.0, "records": [RECORD, WITH], "costs": [COST],
        "problems": [], **changes,
    }  # fmt: skip


def test_cost_counts_every_step_of_both_ends() -> None:
    cost = message_cost(2, 0.5)
    assert cost["received_steps"] == cost["steps"] > 20
    assert 0 < cost["reports"] < cost["steps"], "a report holds several steps"
    assert min(cost["engine_us"], cost["sender_us"], cost["gateway_us"]) > 0
    assert 20 < cost["bytes"] < 2000


@pytest.mark.parametrize(
    ("records", "costs", "problem"),
    [
        ([RECORD, WITH], [COST], None),
        ([RECORD, {**WITH, "served": 3}], [COST], "round 0 with the channel: 1 paced requests were not served"),
        (
            [{**RECORD, "batch_clients_failed": ["HTTPError: x"]}, WITH],
            [COST],
            "round 0 without the channel: HTTPError",
        ),
        (
            [RECORD, {**WITH, "preemptions": 0}],
            [COST],
            "round 0 with the channel: no best-effort request was preempted",
        ),
        ([{**RECORD, "preemptions": 1}, WITH], [COST], "round 0 without the channel: best-effort requests were"),
        ([RECORD, WITH], [{**COST, "received_steps": 99}], "steps of 20 ms: 99 of 100 were received"),
    ],
)
def test_every_failed_check_is_named(
    records: list[dict[str, Any]], costs: list[dict[str, Any]], problem: str | None
) -> None:
    found = report_channel.problems(records, costs)
    assert [line.startswith(problem or "-") for line in found] == [True] * (problem is not None)


def test_page_compares_both_gateways() -> None:
    text = report_page.page(document(problems=["a check"]))
    assert "| TTFT p50, s | 3.50 | 0.10 |" in text
    assert "| first token within 1 s | 25% | 100% |" in text
    assert "| 20 | 20 (0.1%) | 30 (0.1%) | 100 (0.5%) | 150 | 7,500 |" in text
    assert "- a check" in text
    assert "--rounds 1 --json" in text
