"""Run records: which requests each metric counts."""

from __future__ import annotations

import json
import math

import pytest

from lab.records.run_record import RequestResult, run_record
from lab.workload import WorkloadRequest

KEYS = {
    "policy", "qps", "seed", "requests", "duration_s", "goodput", "slo_adherence", "rejected", "ttft_violations",
    "tpot_violations", "ttft_p50_s", "ttft_p99_s", "tpot_p50_s", "tpot_p99_s", "per_class", "count_bound", "fair_bound",
    "scheduling_s", "wall_s", "finished", "failed", "e2e_violations", "e2e_p50_s", "e2e_p99_s",
}  # fmt: skip


def result(
    outcome: str = "finished", ttft_s: float | None = 0.4, tpot_s: float = 0.02, category: int = 1
) -> RequestResult:
    return RequestResult(WorkloadRequest(0.0, 10, 20, 0.5, 0.03, category), outcome, ttft_s, tpot_s, 1.0)  # type: ignore[arg-type]


def record(results: list[RequestResult], duration_s: float = 10.0, **more: object) -> dict:
    return run_record("scorpio", 5.0, 1, results, duration_s, wall_s=1.0, scheduling_s=0.1, **more)  # type: ignore[arg-type]


def test_record_has_public_keys_and_is_json() -> None:
    found = record([result()], bounds=(0.9, 0.7), client_lateness_p99_s=0.001)
    assert found.keys() == KEYS | {"client_lateness_p99_s"}
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert (found["count_bound"], found["fair_bound"]) == (0.9, 0.7)


def test_record_keeps_rejected_and_failed_in_denominator() -> None:
    found = record([result(), result("rejected", None), result("failed", 0.1), result("failed", None)])
    assert found["slo_adherence"] == 0.25
    assert found["rejected"] == 0.25
    assert found["failed"] == 0.5
    assert found["finished"] == 0.25


def test_goodput_is_attained_requests_over_duration() -> None:
    assert record([result(), result(), result(ttft_s=0.6)], duration_s=4.0)["goodput"] == 0.5


def test_violations_count_finished_requests_per_bound() -> None:
    found = record(
        [result(ttft_s=0.6), result(tpot_s=0.04), result(ttft_s=0.6, tpot_s=0.04), result("failed", 9.0, 9.0)]
    )
    assert found["ttft_violations"] == 0.5
    assert found["tpot_violations"] == 0.5
    assert found["slo_adherence"] == 0.0


def test_latency_equal_to_bound_attains() -> None:
    assert result(ttft_s=0.5, tpot_s=0.03).attained
    assert not result(ttft_s=math.nextafter(0.5, 1)).attained


def test_finished_without_observed_first_token_violates_ttft() -> None:
    assert result(ttft_s=None).ttft_violated


def test_quantiles_cover_finished_requests() -> None:
    found = record([result(ttft_s=0.1), result(ttft_s=0.3), result("failed", 50.0, 50.0)])
    assert found["ttft_p50_s"] == pytest.approx(0.2)
    assert found["tpot_p99_s"] == pytest.approx(0.02)


def test_record_has_metrics_per_class() -> None:
    per_class = record([result(category=1), result("rejected", None, category=1), result(category=6)])["per_class"]
    assert list(per_class) == ["1", "6"]
    assert per_class["1"]["requests"] == 2
    assert per_class["1"]["slo_adherence"] == 0.5
    assert per_class["6"]["slo_adherence"] == 1.0


def test_record_uses_null_for_unknown_values() -> None:
    found = record([result("rejected", None)], duration_s=0.0)
    assert [found[key] for key in ("goodput", "ttft_p50_s", "tpot_p99_s", "count_bound")] == [None] * 4
    json.dumps(found, allow_nan=False)


def test_record_without_requests_raises() -> None:
    with pytest.raises(ValueError, match="at least one request"):
        record([])
