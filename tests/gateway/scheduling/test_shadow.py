"""A shadow's own books: what another policy would have decided, and how long it would have been busy with that."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_adapter.engine import EngineState
from engine_adapter.step_time.linear_forms import StepTimes
from engine_adapter.step_time.model import StepTimeModel
from gateway.policies.base import Decision, Policy, reject_tpot, reject_ttft
from gateway.policies.registry import POLICIES, make_policy
from gateway.policies.slack.policy import Slack
from gateway.requests.request import Request
from gateway.requests.slo import Slo, SloClass
from gateway.scheduling.shadow import Shadow

TIMES = StepTimes(b=1e-3, d=0.009, alpha=1e-3)
"""Alone, a token takes 10 ms; a prompt of 100 tokens 100 ms."""

CLASSES = {
    "chat": SloClass("chat", Slo(5.0, 1.0)),
    "small": SloClass("small", Slo(), max_waiting=1),
    "batch": SloClass("batch", Slo(5.0, 1.0), on_unattainable="best_effort"),
}


@dataclass
class Scripted:
    """Does with each that waits what ``does`` says: admit, reject, or anything else to keep it."""

    does: Callable[[Request], str]
    name: str = "scripted"
    gate: str = "open"
    shown: EngineState | None = None

    def order(self, request: Request) -> tuple[float, ...]:
        return (request.arrival_s,)

    def decide(
        self, now: float, waiting: Sequence[Request], running: Collection[Request], engine: EngineState
    ) -> Decision:
        self.shown, decision = engine, Decision()
        for request in waiting:
            if self.does(request) == "admit":
                decision.admit.append(request)
            elif self.does(request) == "reject":
                decision.reject.append(reject_ttft(request, 2.0, 2.0, 1.0, False))
        return decision


def shadow(policy: Policy | str, *, most_known: int = 1000, **limits: int) -> Shadow:
    """A shadow with ``policy``, or with one that does the same to everybody."""
    chosen = Scripted(lambda request: policy) if isinstance(policy, str) else policy
    engine = EngineState(alive=True, step_time=StepTimeModel(times=TIMES, learn=False), **limits)
    turns = lambda request: CLASSES[request.slo_class].on_unattainable == "best_effort"  # noqa: E731
    return Shadow("scripted", chosen, engine, CLASSES, turns, most_known)


def ask(name: str, group: str = "chat", *, at: float = 0.0, prompt: int = 100, output: float = 11) -> Request:
    return Request(name, group, at, CLASSES[group].slo, prompt, output)


def ran(made: Shadow, request: Request, *, until: float, step: float = 0.001) -> float:
    """When ``made`` is through with ``request``, which it has admitted; looks every ``step`` seconds."""
    now = 0.0
    while made.running and now < until:
        now += step
        made.look(now)
    return now


# --- what it counts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["active", "shadow"])
@pytest.mark.parametrize(
    ("active", "would", "counted"),
    [
        ("admitted", "admit", ("admitted", "")),
        ("admitted", "reject", ("rejected", "ttft_unattainable")),
        ("rejected", "admit", ("admitted", "")),
        ("rejected", "reject", ("rejected", "ttft_unattainable")),
    ],
)
def test_it_counts_what_it_decides_and_whether_the_active_policy_agrees(
    first: str, active: str, would: str, counted: tuple[str, str]
) -> None:
    made, request = shadow(would), ask("a")
    made.submitted(request)
    if first == "shadow":
        made.look(1.0)
    made.admitted(request) if active == "admitted" else made.rejected(request)
    made.look(1.0)
    assert made.outcomes == {("chat", *counted): 1}
    assert made.agreement == {(active, {"admit": "admitted", "reject": "rejected"}[would]): 1}


def test_what_it_would_serve_at_best_effort_it_admits_under_that_name() -> None:
    made, request = shadow(Scripted(lambda r: "admit" if r.best_effort else "reject")), ask("a", "batch")
    made.submitted(request)
    assert made.look(1.0) == 1.0, "without its bounds it may be admitted at once"
    made.look(1.1)
    assert made.outcomes == {("batch", "admitted", "best_effort"): 1}


def test_a_bound_that_fails_is_named_as_in_the_ledger() -> None:
    @dataclass
    class Strict(Scripted):
        def decide(self, now, waiting, running, engine):  # type: ignore[no-untyped-def]
            return Decision(reject=[reject_tpot(request, 2.0, 0.0, True) for request in waiting])

    made = shadow(Strict(lambda r: ""))
    made.submitted(ask("a"))
    made.look(1.0)
    assert made.outcomes == {("chat", "rejected", "tpot_unattainable"): 1}


def test_its_queue_has_the_limits_of_the_classes() -> None:
    made = shadow("keep")
    for name in "abc":
        made.submitted(ask(name, "small"))
    assert made.waiting == 1
    assert made.outcomes == {("small", "rejected", "queue_full"): 2}


def test_what_comes_when_its_books_are_full_is_not_seen() -> None:
    made = shadow("keep", most_known=2)
    for name in "abc":
        made.submitted(ask(name))
    assert (made.waiting, made.outcomes) == (2, {("chat", "unseen", "full"): 1})


def test_who_leaves_undecided_is_forgotten_and_said_to_have_left() -> None:
    made, waits, runs = shadow(Scripted(lambda r: "admit" if r.id == "runs" else "keep")), ask("waits"), ask("runs")
    for request in (waits, runs):
        made.submitted(request)
    made.look(0.0)
    for request in (waits, runs):
        made.withdrawn(request)
    assert (made.waiting, made.running) == (0, 0)
    assert made.outcomes == {("chat", "left", ""): 1, ("chat", "admitted", ""): 1}
    assert not made.agreement


# --- two worlds -------------------------------------------------------------------------------------------------------


def test_the_real_request_does_not_learn_what_a_shadow_did_to_its_copy() -> None:
    made, request = shadow(Scripted(lambda r: "admit" if r.best_effort else "reject")), ask("a", "batch")
    made.submitted(request)
    for now in (0.1, 0.2, 0.3, 0.4):
        made.look(now)
    assert made.running == 1
    assert (request.best_effort, request.admitted_s, request.first_token_s, request.generated) == (False, None, None, 0)
    assert request.deadline_s == 5.0


def test_what_the_active_policy_made_of_a_request_is_not_in_the_copy() -> None:
    waiting: list[Request] = []
    made, request = shadow(Scripted(lambda r: waiting.append(r) or "keep")), ask("a", "batch")
    made.submitted(request)
    request.serve_at_best_effort()
    made.admitted(request)
    made.look(1.0)
    (copy,) = set(waiting)
    assert copy is not request
    assert (copy.best_effort, copy.deadline_s, copy.admitted_s) == (False, 5.0, None)


@pytest.mark.parametrize("tokens", [5, 21])
def test_a_request_is_as_long_as_the_real_one_was_but_at_the_pace_of_the_shadows_world(tokens: int) -> None:
    made, request = shadow("admit"), ask("a", output=11)
    made.submitted(request)
    made.admitted(request)
    made.look(0.0)
    request.advance(tokens)
    made.left(request)
    assert ran(made, request, until=1.0) == pytest.approx(0.1 + (tokens - 1) * 0.01, abs=0.005)
    assert made._known == {}


def test_it_may_begin_a_request_that_the_engine_is_through_with() -> None:
    holds = True
    made, request = shadow(Scripted(lambda r: "keep" if holds else "admit")), ask("a")
    made.submitted(request)
    made.admitted(request)
    request.advance(6)
    made.left(request)
    made.look(9.0)
    holds = False
    made.look(10.0)
    made.look(10.11)
    made.look(10.14)
    assert made.running == 1
    made.look(10.17)
    assert (made.running, made._known) == (0, {})


def test_while_the_real_request_goes_on_beyond_its_prediction_so_does_the_shadows() -> None:
    made, request = shadow("admit"), Request("a", "chat", 0.0, Slo(), 100, 11, 20)
    made.submitted(request)
    made.admitted(request)
    made.look(0.0)
    request.advance(50)
    made.look(0.1)
    made.look(0.35)
    assert made.running == 1, "25 tokens are out, but the real one has 50 and is not done"


def test_what_is_not_known_is_taken_to_be_as_long_as_such_requests_are_on_average() -> None:
    made, request = shadow("admit"), Request("a", "chat", 0.0, Slo(), 100, 11, 30)
    made.submitted(request)
    made.rejected(request)
    made.look(0.0)
    mean = 11 * math.exp((math.log(30 / 11) / 1.2816) ** 2 / 2)
    assert 14 < mean < 15
    assert ran(made, request, until=1.0) == pytest.approx(0.1 + (mean - 1) * 0.01, abs=0.012)


def test_the_engines_own_count_of_the_prompt_is_taken_over() -> None:
    made, request = shadow("admit"), ask("a")
    made.submitted(request)
    made.look(0.0)
    (copy,) = made._admission.running.values()
    request.prompt_tokens = 120
    made.look(0.11)
    assert copy.prompt_tokens == 120


@pytest.mark.parametrize("step", [0.001, 0.02])
def test_what_the_active_policy_rejected_runs_as_long_as_its_predicted_length_takes(step: float) -> None:
    made, request = shadow("admit"), ask("a")
    made.submitted(request)
    made.rejected(request)
    made.look(0.0)
    # 100 tokens of prompt in 0.1 s, the 10 tokens after the first in 0.01 s each.
    assert ran(made, request, until=1.0, step=step) == pytest.approx(0.2, abs=2 * step)
    assert made._known == {}


def test_requests_share_the_engine() -> None:
    made = shadow("admit")
    for name in "abcd":
        made.submitted(ask(name, output=101))
        made.rejected(made._known[name].real)
    made.look(0.0)
    took = ran(made, ask("a"), until=9.0)
    # Four prompts of 0.1 s; then 100 steps of four, each 0.013 s. Prefill takes its share of what decodes meanwhile.
    assert took == pytest.approx(0.4 + 100 * 0.013, rel=0.1)


def test_sequences_beyond_the_engines_places_wait_for_one() -> None:
    made = shadow("admit", max_num_seqs=1, kv_tokens=1000)
    for name in "ab":
        made.submitted(ask(name))
        made.rejected(made._known[name].real)
    made.look(0.0)
    made.look(0.15)
    first, second = made._admission.running.values()
    assert first.first_token_s is not None
    assert second.first_token_s is None
    policy = made._admission.policy
    assert isinstance(policy, Scripted)
    made.submitted(ask("c"))
    made.look(0.16)
    assert policy.shown is not None
    assert (policy.shown.engine_running, policy.shown.engine_waiting) == (1, 1)
    assert 0.1 < policy.shown.kv_usage < 0.2
    assert ran(made, ask("a"), until=2.0) == pytest.approx(0.6, abs=0.1), "one after the other"


def test_who_has_a_pace_has_a_place_before_those_whom_slack_counts_on_to_make_way() -> None:
    started = {}
    for preemptible in (False, True):
        made = shadow(Slack(), max_num_seqs=4)
        made._engine.gate.preemptible = preemptible
        names = [f"free{i}" for i in range(4)] + ["paced"]
        for name in names:
            made.submitted(Request(name, "chat", 0.0, Slo(9.0, 0.5) if name == "paced" else Slo(), 10, 5000))
            made.look(0.0)
        for step in range(1, 100):
            made.look(0.01 * step)
        started[preemptible] = {copy.id for copy in made._admission.running.values() if copy.first_token_s is not None}
    assert started == {False: set(names[:4]), True: {*names[:3], "paced"}}


def test_a_dead_engine_ends_what_runs_and_leaves_what_waits() -> None:
    made = shadow(Scripted(lambda r: "keep" if r.id == "waits" else "admit"))
    for name in ("waits", "rejected", "both"):
        made.submitted(ask(name))
    made.admitted(made._known["both"].real)
    made.look(0.1)
    made.engine_lost()
    assert (made.waiting, made.running) == (1, 0)
    assert "both" not in made._known


def test_a_request_that_the_engine_never_took_is_decided_anew() -> None:
    made, request = shadow("admit"), ask("a")
    made.submitted(request)
    made.admitted(request)
    made.look(0.1)
    made.submitted(request)
    assert (made.waiting, made.running) == (1, 0)
    made.look(0.2)
    assert made.outcomes == {("chat", "admitted", ""): 2}


def test_switched_off_it_keeps_its_counts_and_nothing_else() -> None:
    made = shadow("admit")
    made.submitted(ask("a"))
    made.look(0.0)
    made.submitted(ask("b"))
    made.switch_off()
    assert not made.up
    assert (made.waiting, made.running, made._known) == (0, 0, {})
    assert made.outcomes == {("chat", "admitted", ""): 1}


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["submit", "submit", "look", "look", "admit", "reject", "token", "leave", "withdraw"]),
        st.integers(0, 99),
    ),
    max_size=60,
)


@pytest.mark.parametrize("name", POLICIES)
@given(events=EVENTS)
def test_under_every_policy_each_request_is_counted_once_and_none_is_kept_for_ever(
    name: str, events: list[tuple[str, int]]
) -> None:
    made = shadow(make_policy(name), max_num_seqs=3)
    active: dict[str, str] = {}
    asked: dict[str, Request] = {}
    for number, (event, pick) in enumerate(events):
        now = number / 10
        waits = [r for r in asked.values() if active[r.id] == "waits"]
        runs = [r for r in asked.values() if active[r.id] == "runs"]
        if event == "submit":
            one = ask(str(number), list(CLASSES)[pick % 3], at=now, prompt=1 + pick * 5)
            asked[one.id], active[one.id] = one, "waits"
            made.submitted(one)
        elif event == "look":
            made.look(now)
        elif event == "admit" and waits:
            active[waits[0].id] = "runs"
            made.admitted(waits[0])
        elif event in {"reject", "withdraw"} and waits:
            active[waits[-1].id] = "gone"
            made.rejected(waits[-1]) if event == "reject" else made.withdrawn(waits[-1])
        elif event == "token" and runs:
            runs[0].first_token_s = runs[0].first_token_s or now
            runs[0].advance(1)
        elif event == "leave" and runs:
            active[runs[0].id] = "gone"
            made.left(runs[0])
    for one in asked.values():
        if active[one.id] == "waits":
            made.rejected(one)
        elif active[one.id] == "runs":
            made.left(one)
    for later in range(1, 200):
        made.look(len(events) / 10 + later)
    assert made.outcomes.total() == len(asked)
    assert (made.waiting, made.running, made._known) == (0, 0, {})
