"""The progress of requests that a shadow policy estimates."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import pytest

from engine_adapter.engine import EngineState
from gateway.policies.base import Decision, Policy
from gateway.policies.slack.policy import Slack
from gateway.requests.request import Request
from gateway.requests.slo import Slo
from tests.fixtures.shadow_builders import (
    always,
    ask,
    make_engine,
    make_shadow,
    seconds_until_idle,
)


def test_unfinished_length_is_the_mean_of_the_prediction() -> None:
    shadow, request = make_shadow(always("admit")), Request("a", "chat", 0.0, Slo(), 100, 11, 30)
    shadow.submitted(request)
    shadow.rejected(request)
    shadow.update(0.0)
    mean = 11 * math.exp((math.log(30 / 11) / 1.2816) ** 2 / 2)
    assert 14 < mean < 15
    assert seconds_until_idle(shadow, limit=1.0) == pytest.approx(0.1 + (mean - 1) * 0.01, abs=0.012)


@pytest.mark.parametrize("step", [0.001, 0.02])
def test_rejected_live_request_runs_for_its_predicted_length(step: float) -> None:
    shadow, request = make_shadow(always("admit")), ask("a")
    shadow.submitted(request)
    shadow.rejected(request)
    shadow.update(0.0)
    # 100 prompt tokens in 0.1 s, then 10 tokens in 0.01 s each.
    assert seconds_until_idle(shadow, limit=1.0, step=step) == pytest.approx(0.2, abs=2 * step)
    assert shadow.tracked == 0


def test_running_requests_share_the_engine() -> None:
    shadow = make_shadow(always("admit"))
    for name in "abcd":
        request = ask(name, output=101)
        shadow.submitted(request)
        shadow.rejected(request)
    shadow.update(0.0)
    # Four prompts of 0.1 s, then 100 steps of four sequences in 0.013 s each. Prefill also delays the first decodes.
    assert seconds_until_idle(shadow, limit=9.0) == pytest.approx(0.4 + 100 * 0.013, rel=0.1)


def test_sequences_beyond_max_num_seqs_wait_for_a_slot() -> None:
    policy = always("admit")
    shadow = make_shadow(policy, make_engine(max_num_seqs=1, kv_tokens=1000))
    for name in "ab":
        request = ask(name)
        shadow.submitted(request)
        shadow.rejected(request)
    shadow.update(0.0)
    shadow.update(0.15)
    assert policy.copies["a"].first_token_s is not None
    assert policy.copies["b"].first_token_s is None
    shadow.submitted(ask("c"))
    shadow.update(0.16)
    state = policy.engines[-1]
    assert (state.engine_running, state.engine_waiting) == (1, 1)
    assert 0.1 < state.kv_usage < 0.2
    assert seconds_until_idle(shadow, limit=2.0) == pytest.approx(0.6, abs=0.1), "one after the other"


class RecordingPolicy:
    """Decides as ``policy`` does; ``copies`` holds the waiting requests that it was called with, by id."""

    def __init__(self, policy: Policy) -> None:
        self.name, self.gate, self.order = policy.name, policy.gate, policy.order
        self.copies: dict[str, Request] = {}
        self._policy = policy

    def decide(
        self, now: float, waiting: Sequence[Request], running: Collection[Request], engine: EngineState
    ) -> Decision:
        self.copies |= {request.id: request for request in waiting}
        return self._policy.decide(now, waiting, running, engine)


@pytest.mark.parametrize(
    ("preemptible", "started"),
    [(False, {"free0", "free1", "free2", "free3"}), (True, {"free0", "free1", "free2", "paced"})],
)
def test_paced_requests_get_slots_first_if_best_effort_is_preempted(preemptible: bool, started: set[str]) -> None:
    policy, engine = RecordingPolicy(Slack()), make_engine(max_num_seqs=4)
    engine.gate.preemptible = preemptible
    shadow = make_shadow(policy, engine)
    for name in ("free0", "free1", "free2", "free3", "paced"):
        shadow.submitted(Request(name, "chat", 0.0, Slo(9.0, 0.5) if name == "paced" else Slo(), 10, 5000))
        shadow.update(0.0)
    for step in range(1, 100):
        shadow.update(0.01 * step)
    assert {copy.id for copy in policy.copies.values() if copy.first_token_s is not None} == started
