"""What refined predictions change in the simulator."""

from __future__ import annotations

import json

import pytest

from benchmarks.predictor.refined import AsPredictedAtArrival, compare, main
from gateway.policies.registry import make_policy
from gateway.requests.request import Request
from gateway.requests.slo import Slo

pytestmark = (
    pytest.mark.no_cover
)  # whole simulations, four times slower under a tracer; the rooms have tests of their own


def test_scorpio_reads_no_running_requests_prediction_and_slack_does() -> None:
    rows = {row["policy"]: row for row in compare("a100-llama3.1-8b", qps=42, duration_s=2, seeds=1)}
    assert rows["scorpio"]["at_arrival"] == rows["scorpio"]["refined"]
    assert 0 < rows["slack"]["refined"]["slo_adherence"] <= 1


def test_the_policy_that_believes_in_what_was_predicted_is_shown_just_that() -> None:
    shown = []

    class Watched:
        name, gate = "watched", "open"

        def order(self, request: Request) -> tuple[float, ...]:
            return (request.arrival_s,)

        def decide(self, now, waiting, running, engine):  # type: ignore[no-untyped-def]
            shown.extend(r.predicted_tokens for r in running)
            return make_policy("fcfs", {}).decide(now, waiting, running, engine)

    outlived = Request("r", "c", 0.0, Slo(None, None, None), 10, 50.0, 120.0)
    outlived.advance(80)
    assert outlived.predicted_tokens > 80
    blind = AsPredictedAtArrival(Watched())
    blind.decide(0.0, [], [outlived], None)  # type: ignore[arg-type]
    assert shown == [50.0]
    assert (blind.name, blind.gate, blind.order(outlived)) == ("watched", "open", (0.0,))


def test_the_command_prints_a_table_or_json(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--seeds", "1", "--duration", "1", "--qps", "10"])
    assert "mean" in capsys.readouterr().out
    main(["--seeds", "1", "--duration", "1", "--qps", "10", "--json"])
    assert {row["policy"] for row in json.loads(capsys.readouterr().out)} == {"scorpio", "slack"}
