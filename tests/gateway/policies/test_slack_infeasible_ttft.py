"""`slack` calls a TTFT bound infeasible only if an idle engine would miss it for a request that arrives now."""

from __future__ import annotations

import pytest

from gateway.policies.slack.policy import Slack
from tests.fixtures.policy_builders import NOW, decide, engine, make_request


@pytest.mark.parametrize(("waited_s", "ttft", "infeasible"), [(0.0, 0.09, True), (5.0, 5.05, False), (5.0, 0.09, True)])
def test_slack_late_request_on_an_idle_engine_is_infeasible_without_its_wait(
    waited_s: float, ttft: float, infeasible: bool
) -> None:
    request = make_request(at=NOW - waited_s, ttft=ttft, prompt=100)  # its prefill takes 0.1 s
    (rejection,) = decide(Slack(), NOW, [request], [], engine()).reject
    assert (rejection.bound, rejection.infeasible) == ("ttft", infeasible)
