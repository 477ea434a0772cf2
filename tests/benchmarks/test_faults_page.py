"""The pages of the fault table and of the soak state what was measured."""

from __future__ import annotations

import pytest

from benchmarks.faults import table
from benchmarks.faults.checks import Ends, Verdict
from benchmarks.faults.client import end_of
from benchmarks.faults.fault import Fault, Result, unexpected
from benchmarks.faults.memory_slope import slope
from benchmarks.faults.soak_page import page

CLEAN = Verdict(lost=0, leaked_requests=0, leaked_descriptors=0, memory_mb=1.0, tracebacks=0)


async def no_fault(running: object, ends: Ends) -> None:
    """Inject nothing."""


def test_page_has_a_row_for_each_fault() -> None:
    result = Result(Fault("a part dies", "it is killed", no_fault), "http", rounds=2)
    result.seen.update({"200": 1500, "503 engine_lost": 2})
    result.recovery_s += [0.5, 1.5]
    result.verdicts += [CLEAN, CLEAN]
    mutated = {"engine": "http", "mutations": 20_000, "statuses": {"200": 5, "400": 9, "501": 1}, "longest_s": 1.0}
    mutated |= {"tracebacks": 0, "leaked_requests": 0, "leaked_descriptors": 0}
    text = table.page({"seed": 0, "faults": [table.record(result)], "mutations": [mutated]})
    assert (
        "| a part dies | `http` | 2 | 1,500 x 200, 2 x 503 engine_lost | - | 1.00 (1.50) | 0 | 0 / 0 | +1.0 |" in text
    )
    assert "| `http` | 20,000 | 5 x 200, 9 x 400, 1 x 501 | 1.0 | 0 | 0 | 0 / 0 |" in text


def test_verdict_names_every_problem() -> None:
    assert CLEAN.problems() == []
    bad = Verdict(lost=1, leaked_requests=2, leaked_descriptors=3, memory_mb=500.0, tracebacks=4)
    assert bad.problems() == [
        "lost: 1",
        "leaked_requests: 2",
        "leaked_descriptors: 3",
        "tracebacks: 4",
        "memory_mb: 500",
    ]
    assert bad.problems(memory_mb=600) == bad.problems()[:-1]


def test_unexpected_ends_are_named() -> None:
    fault = Fault("a part dies", "it is killed", no_fault, ends=r"200|503 engine_lost")
    ends = Ends()
    ends.seen.update({"200": 3, "503 engine_lost": 1, "500 internal_error": 2})
    assert unexpected(fault, ends) == ["2 x 500 internal_error"]


@pytest.mark.parametrize(
    ("status", "body", "end"),
    [
        (200, b'{"choices": []}', "200"),
        (429, b'{"error": {"code": "queue_full"}}', "429 queue_full"),
        (200, b'data: {"error": {"code": "engine_lost"}}\n\ndata: [DONE]\n\n', "200, then engine_lost"),
        (500, b"Internal Server Error", "500"),
    ],
)
def test_end_names_status_and_code(status: int, body: bytes, end: str) -> None:
    assert end_of(status, body) == end


def test_slope_is_in_mb_a_minute() -> None:
    assert slope([(float(second), 100.0 + second / 30) for second in range(240)]) == pytest.approx(2.0)


def test_slope_ignores_one_step_and_short_peaks() -> None:
    samples = [(float(t), 100.0 + 30 * (t >= 50) + 200 * (t % 40 == 7)) for t in range(600)]
    assert slope(samples) == pytest.approx(0.0)


def test_slope_of_a_moment_is_zero() -> None:
    assert slope([(0.0, 100.0), (1.0, 120.0)]) == 0.0


def test_soak_page_has_the_figures() -> None:
    row = {
        "engine": "simulated", "minutes": 10.0, "warm_up_min": 3.0, "requests": 20_000, "lost": 0, "leaked_requests": 0,
        "clients": 116, "saturation_per_s": 19.5, "offered_per_s": 39.0, "longest_s": 82.1, "leaked_descriptors": 0,
        "memory_mb": {"start": 85.0, "warm": 98.0, "peak": 110.0, "end": 99.0},
        "slope_mb_per_min": 0.05, "descriptors": {"before": 30, "peak": 300, "after": 30}, "seen": {"200": 9},
        "abusive": {"400": 4}, "faults": {"reload": 3}, "problems": [],
        "ledger": {"accepted": 19_000, "finished": 18_000, "rejected": 900, "failed": 0, "cancelled": 100, "open": 0},
    }  # fmt: skip
    text = page({"soaks": [row]})
    load = "| simulated | 3 + 10 | 19.5/s for 116 clients | 39.0/s | 20,000 | 82 s |"
    assert f"{load} 0 | 0 / 0 | 85, 98, 99, 110 | +0.05 | 30, 300, 30 |" in text
    assert "Problems:\n\nNone." in text
    assert "| 4 x 400 | 3 x reload | 19,000 accepted, 18,000 finished, 900 rejected" in text
    assert "- simulated: lost: 2" in page({"soaks": [{**row, "problems": ["lost: 2"]}]})
