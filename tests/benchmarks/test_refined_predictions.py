"""The study of refined predictions in the simulator."""

from __future__ import annotations

import json

import pytest

from benchmarks.predictor.refined import PredictionsAtArrival, compare, main
from gateway.policies.registry import make_policy
from gateway.requests.request import Request
from gateway.requests.slo import Slo

# Whole simulations run four times slower under a tracer, and the simulator has tests of its own.
pytestmark = pytest.mark.no_cover


def test_refined_predictions_do_not_affect_scorpio() -> None:
    rows = {row["policy"]: row for row in compare("a100-llama3.1-8b", qps=42, duration_s=2, seeds=1)}
    assert rows["scorpio"]["at_arrival"] == rows["scorpio"]["refined"]
    assert 0 < rows["slack"]["refined"]["slo_adherence"] <= 1


def test_predictions_at_arrival_resets_running_requests() -> None:
    predictions = []

    class Recorder:
        name, gate = "recorder", "open"

        def order(self, request: Request) -> tuple[float, ...]:
            return (request.arrival_s,)

        def decide(self, now, waiting, running, engine):  # type: ignore[no-untyped-def]
            predictions.extend(r.predicted_tokens for r in running)
            return make_policy("fcfs", {}).decide(now, waiting, running, engine)

    request = Request("r", "c", 0.0, Slo(None, None, None), 10, 50.0, 120.0)
    policy = PredictionsAtArrival(Recorder())
    policy.decide(0.0, [request], [], None)  # type: ignore[arg-type]
    request.advance(80)
    assert request.predicted_tokens > 80
    policy.decide(1.0, [], [request], None)  # type: ignore[arg-type]
    assert predictions == [50.0]
    assert (request.predicted_p90, policy.name, policy.gate) == (120.0, "recorder", "open")
    assert policy.order(request) == (0.0,)


def test_command_prints_table_or_json(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--seeds", "1", "--duration", "1", "--qps", "10"])
    assert "mean" in capsys.readouterr().out
    main(["--seeds", "1", "--duration", "1", "--qps", "10", "--json"])
    assert {row["policy"] for row in json.loads(capsys.readouterr().out)} == {"scorpio", "slack"}
