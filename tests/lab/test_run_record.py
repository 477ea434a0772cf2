"""The record of a run: what counts in which figure."""

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


def served(
    outcome: str = "finished", ttft_s: float | None = 0.4, tpot_s: float = 0.02, category: int = 1
) -> RequestResult:
    return RequestResult(WorkloadRequest(0.0, 10, 20, 0.5, 0.03, category), outcome, ttft_s, tpot_s, 1.0)  # type: ignore[arg-type]


def record(all_served: list[RequestResult], duration_s: float = 10.0, **more: object) -> dict:
    return run_record("scorpio", 5.0, 1, all_served, duration_s, wall_s=1.0, scheduling_s=0.1, **more)  # type: ignore[arg-type]


def test_a_record_has_the_keys_that_readers_rely_on_and_is_json() -> None:
    found = record([served()], bounds=(0.9, 0.7), client_lateness_p99_s=0.001)
    assert found.keys() == KEYS | {"client_lateness_p99_s"}
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert (found["count_bound"], found["fair_bound"]) == (0.9, 0.7)


def test_rejected_and_failed_requests_stay_in_the_denominator() -> None:
    found = record([served(), served("rejected", None), served("failed", 0.1), served("failed", None)])
    assert found["slo_adherence"] == 0.25
    assert found["rejected"] == 0.25
    assert found["failed"] == 0.5
    assert found["finished"] == 0.25


def test_goodput_counts_attained_requests_over_the_whole_duration() -> None:
    assert record([served(), served(), served(ttft_s=0.6)], duration_s=4.0)["goodput"] == 0.5


def test_violations_count_finished_requests_only_and_each_bound_by_itself() -> None:
    found = record(
        [served(ttft_s=0.6), served(tpot_s=0.04), served(ttft_s=0.6, tpot_s=0.04), served("failed", 9.0, 9.0)]
    )
    assert found["ttft_violations"] == 0.5
    assert found["tpot_violations"] == 0.5
    assert found["slo_adherence"] == 0.0


def test_a_bound_that_is_just_met_is_met() -> None:
    assert served(ttft_s=0.5, tpot_s=0.03).attained
    assert not served(ttft_s=math.nextafter(0.5, 1)).attained


def test_a_finished_request_whose_first_token_nobody_saw_broke_its_bound() -> None:
    assert served(ttft_s=None).ttft_violated


def test_quantiles_are_over_finished_requests() -> None:
    found = record([served(ttft_s=0.1), served(ttft_s=0.3), served("failed", 50.0, 50.0)])
    assert found["ttft_p50_s"] == pytest.approx(0.2)
    assert found["tpot_p99_s"] == pytest.approx(0.02)


def test_each_class_has_its_own_figures() -> None:
    per_class = record([served(category=1), served("rejected", None, category=1), served(category=6)])["per_class"]
    assert list(per_class) == ["1", "6"]
    assert per_class["1"]["requests"] == 2
    assert per_class["1"]["slo_adherence"] == 0.5
    assert per_class["6"]["slo_adherence"] == 1.0


def test_what_is_not_known_is_null_and_nothing_is_nan() -> None:
    found = record([served("rejected", None)], duration_s=0.0)
    assert [found[key] for key in ("goodput", "ttft_p50_s", "tpot_p99_s", "count_bound")] == [None] * 4
    json.dumps(found, allow_nan=False)


def test_a_run_without_requests_has_no_figures() -> None:
    with pytest.raises(ValueError, match="without requests"):
        record([])
