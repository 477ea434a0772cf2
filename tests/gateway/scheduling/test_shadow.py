"""A shadow policy: what it counts, how its copies relate to the live requests, and its lifetime."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.policies.base import reject_tpot
from gateway.policies.fcfs import Fcfs
from gateway.policies.registry import POLICIES, make_policy
from gateway.requests.request import Request
from gateway.requests.slo import Slo
from gateway.scheduling.shadow import Shadow
from tests.fixtures.shadow_builders import (
    CLASSES,
    ScriptedPolicy,
    always,
    ask,
    make_engine,
    make_shadow,
    only_best_effort,
    seconds_until_idle,
)

# --- outcomes and agreement -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["active", "shadow"])
@pytest.mark.parametrize(
    ("active", "action", "counted"),
    [
        ("admitted", "admit", ("admitted", "")),
        ("admitted", "reject", ("rejected", "ttft_unattainable")),
        ("rejected", "admit", ("admitted", "")),
        ("rejected", "reject", ("rejected", "ttft_unattainable")),
    ],
)
def test_shadow_counts_its_outcome_and_the_agreement(
    first: str, active: str, action: str, counted: tuple[str, str]
) -> None:
    shadow, request = make_shadow(always(action)), ask("a")
    shadow.submitted(request)
    if first == "shadow":
        shadow.update(1.0)
    shadow.admitted(request) if active == "admitted" else shadow.rejected(request)
    shadow.update(1.0)
    assert shadow.outcomes == {("chat", *counted): 1}
    assert shadow.agreement == {(active, counted[0]): 1}


def test_shadow_counts_best_effort_admission() -> None:
    shadow = make_shadow(only_best_effort())
    shadow.submitted(ask("a", "batch"))
    assert shadow.update(1.0) == 1.0, "decide again at once, without the bounds"
    shadow.update(1.1)
    assert shadow.outcomes == {("batch", "admitted", "best_effort"): 1}


def test_shadow_names_the_bound_of_a_rejection() -> None:
    shadow = make_shadow(ScriptedPolicy(lambda r: "reject", lambda r: reject_tpot(r, 2.0, 0.0, True)))
    shadow.submitted(ask("a"))
    shadow.update(1.0)
    assert shadow.outcomes == {("chat", "rejected", "tpot_unattainable"): 1}


def test_shadow_queue_has_the_class_limits() -> None:
    shadow = make_shadow(always("wait"))
    for name in "abc":
        shadow.submitted(ask(name, "small"))
    assert shadow.waiting == 1
    assert shadow.outcomes == {("small", "rejected", "queue_full"): 2}


def test_shadow_counts_requests_beyond_max_tracked_as_unseen() -> None:
    shadow = make_shadow(always("wait"), max_tracked=2)
    for name in "abc":
        shadow.submitted(ask(name))
    assert (shadow.waiting, shadow.outcomes) == (2, {("chat", "unseen", "full"): 1})


def test_shadow_counts_undecided_withdrawn_requests_as_left() -> None:
    shadow = make_shadow(ScriptedPolicy(lambda r: "admit" if r.id == "runs" else "wait"))
    requests = ask("waits"), ask("runs")
    for request in requests:
        shadow.submitted(request)
    shadow.update(0.0)
    for request in requests:
        shadow.withdrawn(request)
    assert (shadow.waiting, shadow.running) == (0, 0)
    assert shadow.outcomes == {("chat", "left", ""): 1, ("chat", "admitted", ""): 1}
    assert not shadow.agreement


# --- copies and live requests -----------------------------------------------------------------------------------------


def test_shadow_never_changes_the_live_request() -> None:
    shadow, request = make_shadow(only_best_effort()), ask("a", "batch")
    shadow.submitted(request)
    for now in (0.1, 0.2, 0.3, 0.4):
        shadow.update(now)
    assert shadow.running == 1
    assert (request.bounds_waived, request.admitted_s, request.first_token_s, request.generated) == (
        False,
        None,
        None,
        0,
    )
    assert request.deadline_s == 5.0


def test_shadow_copy_ignores_changes_by_the_active_policy() -> None:
    policy, request = always("wait"), ask("a", "batch")
    shadow = make_shadow(policy)
    shadow.submitted(request)
    request.serve_at_best_effort()
    shadow.admitted(request)
    shadow.update(1.0)
    copy = policy.copies["a"]
    assert copy is not request
    assert (copy.bounds_waived, copy.deadline_s, copy.admitted_s) == (False, 5.0, None)


@pytest.mark.parametrize("tokens", [5, 21])
def test_shadow_request_gets_the_length_of_the_finished_live_one(tokens: int) -> None:
    shadow, request = make_shadow(always("admit")), ask("a", output=11)
    shadow.submitted(request)
    shadow.admitted(request)
    shadow.update(0.0)
    request.advance(tokens)
    shadow.left(request)
    assert seconds_until_idle(shadow, limit=1.0) == pytest.approx(0.1 + (tokens - 1) * 0.01, abs=0.005)
    assert shadow.tracked == 0


def test_shadow_may_admit_a_request_that_the_engine_has_finished() -> None:
    policy, request = always("wait"), ask("a")
    shadow = make_shadow(policy)
    shadow.submitted(request)
    shadow.admitted(request)
    request.advance(6)
    shadow.left(request)
    shadow.update(9.0)
    policy.action = lambda r: "admit"
    for now in (10.0, 10.11, 10.14):
        shadow.update(now)
    assert shadow.running == 1
    shadow.update(10.17)
    assert (shadow.running, shadow.tracked) == (0, 0)


def test_shadow_request_runs_on_while_the_live_one_exceeds_its_prediction() -> None:
    shadow, request = make_shadow(always("admit")), Request("a", "chat", 0.0, Slo(), 100, 11, 20)
    shadow.submitted(request)
    shadow.admitted(request)
    shadow.update(0.0)
    request.advance(50)
    shadow.update(0.1)
    shadow.update(0.35)
    assert shadow.running == 1, "the shadow has 25 tokens, but the live request has 50 and has not finished"


def test_shadow_takes_the_prompt_size_that_the_engine_reports() -> None:
    policy, request = always("admit"), ask("a")
    shadow = make_shadow(policy)
    shadow.submitted(request)
    shadow.update(0.0)
    request.prompt_tokens = 120
    shadow.update(0.11)
    assert policy.copies["a"].prompt_tokens == 120


# --- lifetime ---------------------------------------------------------------------------------------------------------


def test_engine_loss_ends_the_running_set_and_keeps_the_queue() -> None:
    shadow = make_shadow(ScriptedPolicy(lambda r: "wait" if r.id == "waits" else "admit"))
    requests = {name: ask(name) for name in ("waits", "undecided", "decided")}
    for request in requests.values():
        shadow.submitted(request)
    shadow.admitted(requests["decided"])
    shadow.update(0.1)
    shadow.engine_lost()
    assert (shadow.waiting, shadow.running) == (1, 0)
    assert shadow.tracked == 2, "the active policy has not decided on two requests"


def test_resubmitted_request_is_decided_again() -> None:
    shadow, request = make_shadow(always("admit")), ask("a")
    shadow.submitted(request)
    shadow.admitted(request)
    shadow.update(0.1)
    shadow.submitted(request)
    assert (shadow.waiting, shadow.running) == (1, 0)
    shadow.update(0.2)
    assert shadow.outcomes == {("chat", "admitted", ""): 2}


def test_disabled_shadow_keeps_only_its_counts() -> None:
    shadow = make_shadow(Fcfs())
    shadow.submitted(ask("a"))
    shadow.update(0.0)
    shadow.submitted(ask("b"))
    shadow.disable()
    assert not shadow.up
    assert (shadow.waiting, shadow.running, shadow.tracked) == (0, 0, 0)
    assert shadow.outcomes == {("chat", "admitted", ""): 1}


class ActivePolicy:
    """The active policy and engine of the property test below: sends random events to ``shadow``."""

    def __init__(self, shadow: Shadow) -> None:
        self.shadow = shadow
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.submitted = 0

    def submit(self, now: float, pick: int) -> None:
        request = ask(str(now), list(CLASSES)[pick % 3], at=now, prompt=1 + pick * 5)
        self.submitted += 1
        self.waiting.append(request)
        self.shadow.submitted(request)

    def update(self, now: float, pick: int) -> None:
        self.shadow.update(now)

    def admit(self, now: float, pick: int) -> None:
        if self.waiting:
            self.running.append(self.waiting.pop(0))
            self.shadow.admitted(self.running[-1])

    def reject(self, now: float, pick: int) -> None:
        if self.waiting:
            self.shadow.rejected(self.waiting.pop())

    def withdraw(self, now: float, pick: int) -> None:
        if self.waiting:
            self.shadow.withdrawn(self.waiting.pop())

    def token(self, now: float, pick: int) -> None:
        if self.running:
            self.running[0].first_token_s = self.running[0].first_token_s or now
            self.running[0].advance(1)

    def finish(self, now: float, pick: int) -> None:
        if self.running:
            self.shadow.left(self.running.pop(0))

    def drain(self, now: float) -> None:
        while self.waiting or self.running:
            self.reject(now, 0)
            self.finish(now, 0)


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["submit", "submit", "update", "update", "admit", "reject", "token", "finish", "withdraw"]),
        st.integers(0, 99),
    ),
    max_size=60,
)


@pytest.mark.parametrize("name", POLICIES)
@given(events=EVENTS)
def test_shadow_counts_each_request_once_and_forgets_all(name: str, events: list[tuple[str, int]]) -> None:
    shadow = make_shadow(make_policy(name), make_engine(max_num_seqs=3))
    active = ActivePolicy(shadow)
    for number, (event, pick) in enumerate(events):
        getattr(active, event)(number / 10, pick)
    end = len(events) / 10
    active.drain(end)
    for later in range(1, 200):
        shadow.update(end + later)
    assert shadow.outcomes.total() == active.submitted
    assert (shadow.waiting, shadow.running, shadow.tracked) == (0, 0, 0)
