"""The study of autoscaling: its rival, and its page."""

from __future__ import annotations

from benchmarks.autoscaling.study import QueueLength, Recorded, page
from lab.simulate.lifecycle import FleetLoad


def _load(now: float, serving: int, requests: int) -> FleetLoad:
    return FleetLoad(now, serving, 0, 0, requests)


def test_queue_length_scaling_follows_the_rule_of_kubernetes() -> None:
    scaler = QueueLength(16)

    assert scaler.replicas(_load(0, 2, 33)) == 2  # within 10%
    assert scaler.replicas(_load(15, 2, 40)) == 3
    assert scaler.replicas(_load(30, 2, 400)) == 4  # at most twice as many
    assert scaler.replicas(_load(45, 4, 16)) == 4  # down only after five minutes
    assert scaler.replicas(_load(400, 4, 16)) == 1


def test_recorded_scaling_takes_the_highest_of_the_last_minutes() -> None:
    scaler = Recorded([(300.0, 5), (450.0, 2), (600.0, 3)], spare=1)

    assert scaler.replicas(_load(0, 4, 0)) == 4  # nothing is known yet: the number stays
    assert scaler.replicas(_load(500, 4, 0)) == 6
    assert scaler.replicas(_load(650, 4, 0)) == 4


def test_page_counts_differences_from_the_search() -> None:
    windows = [
        {"start_s": 0.0, "searched": 2, "same": 2, "before": None},
        {"start_s": 300.0, "searched": 5, "same": 4, "before": 2},
    ]
    fleet = {"name": "wanted replicas", "adherence": 0.98, "gpu_hours": 1.5, "most": 5}
    trace = {
        "trace": "azure-conv", "rate_scale": 4.0, "minutes": 10.0, "seed": 0, "windows": windows, "sampled": 0.5,
        "signal_cpu_s": 7.0, "fleets": [fleet],
    }  # fmt: skip

    text = page({"command": "python -m benchmarks.autoscaling.study", "traces": [trace]})

    assert "| the requests of the same window | 1 of 2 | 2 of 2 | 1 |" in text
    assert "| the window before | 0 of 1 | 0 of 1 | 3 |" in text
    assert "| azure-conv | wanted replicas | 0.9800 | 1.50 | 5 |" in text
