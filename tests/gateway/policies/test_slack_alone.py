"""The fast path of `slack` makes the decision of the arrays."""

from __future__ import annotations

import random
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_adapter.engine import EngineState
from engine_adapter.service_kind import ServiceKind
from engine_adapter.step_report import GateReport
from engine_adapter.step_time.linear_forms import StepTimes
from engine_adapter.step_time.model import StepTimeModel
from engine_adapter.step_time.profile import load_profile
from gateway.policies.base import Decision
from gateway.policies.running_batch import RunningBatch
from gateway.policies.slack import policy as slack_policy
from gateway.policies.slack.batch import WaitingBatch, fits_alone, surely_fits
from gateway.policies.slack.policy import Slack
from gateway.requests.request import Request
from gateway.requests.waiting_arrays import WaitingArrays
from tests.fixtures.policy_builders import (
    NOW,
    RUNNING,
    TIMES,
    WAITING,
    admitted,
    decide,
    engine,
    make_request,
    running,
)

PROFILES = [TIMES, load_profile("a100-llama3.1-8b").step_times(), StepTimes(a=1e-6, b=0.0, c=0.0, d=0.02, alpha=1e-5)]

ENGINES = st.builds(
    lambda times, slots, tokens, kv_tokens, preemptible, shared: engine(
        step_time=StepTimeModel(times=times, learn=False), max_num_seqs=slots, max_num_batched_tokens=tokens,
        kv_tokens=kv_tokens, gate=GateReport(preemptible=preemptible), shared_tokens=shared,
    ),
    st.sampled_from(PROFILES), st.integers(1, 30), st.sampled_from([64, 512, 8192]), st.sampled_from([0, 4000, 40_000]),
    st.booleans(), st.sampled_from([0, 500]),
)  # fmt: skip


def both(
    request: Request, old: list[Request], state: EngineState, active: list[str]
) -> tuple[tuple[Decision, object, object], tuple[Decision, object, object], bool]:
    """Return what `Slack` decides and remembers with and without the fast path, and whether that decided."""
    found, took = [], []

    def recorded(*args: object) -> bool:
        took.append(fits_alone(*args))  # type: ignore[arg-type]
        return took[-1]

    for test in (recorded, lambda *args: False):
        policy = Slack()
        policy._tenants.note(NOW - 1, [make_request(tenant=tenant) for tenant in active], 1e-3)
        with mock.patch.object(slack_policy, "fits_alone", test):
            decision = decide(policy, NOW, [request], old, state)
        found.append((decision, policy._classes, policy._tenants))
    return found[0], found[1], took == [True]


@given(
    request=WAITING,
    old=st.lists(RUNNING, max_size=12),
    state=ENGINES,
    active=st.lists(st.sampled_from("ab"), max_size=4),
    seed=st.integers(0, 9),
)
def test_one_waiting_request_gets_the_decision_of_the_arrays(
    request: Request, old: list[Request], state: EngineState, active: list[str], seed: int
) -> None:
    rng = random.Random(seed)
    for number, each in enumerate([request, *old]):
        each.tenant, each.id = rng.choice("ab"), str(number)
        if number and each.kind is ServiceKind.PACED and rng.random() < 0.3:
            each.kind = ServiceKind.YIELDING
    fast, arrays, _ = both(request, old, state, active)
    assert fast == arrays


@given(seed=st.integers(0, 1000), tenants=st.integers(1, 3))
def test_light_load_takes_the_fast_path(seed: int, tenants: int) -> None:
    rng = random.Random(seed)
    profile = load_profile("a100-llama3.1-8b")
    state = engine(step_time=StepTimeModel(times=profile.step_times(), learn=False), kv_tokens=profile.kv_tokens)
    old = [running(str(i), tpot=0.05, tenant=f"t{i % tenants}", prompt=rng.randint(1, 400)) for i in range(6)]
    request = make_request(ttft=2.0, tpot=rng.choice([None, 0.03, 0.05]), prompt=rng.randint(1, 400), tenant="new")
    fast, arrays, took = both(request, old, state, ["t0"])
    assert took
    assert fast == arrays
    assert admitted(fast[0]) == ["r"]


@pytest.mark.parametrize("name", ["tenant above its share", "end-to-end bound", "backlog", "no slot", "late"])
def test_what_needs_more_is_left_to_the_arrays(name: str) -> None:
    old = [running(f"old{i}", tpot=0.05, tenant="a") for i in range(3)]
    if name == "tenant above its share":
        request = make_request(ttft=5.0, tpot=0.05, tenant="a")
        assert both(request, old, engine(), ["b"])[0][0].yielding == {"r"}
        return
    request = make_request(ttft=0.11 if name == "late" else 5.0, tpot=0.05, e2e=9.0 if name.startswith("end") else None)
    if name == "backlog":
        old[0].first_token_s = None
    fast, arrays, took = both(request, old, engine(max_num_seqs=3 if name == "no slot" else 8), [])
    assert not took
    assert fast == arrays


@given(
    waiting=st.lists(WAITING, min_size=1, max_size=6),
    old=st.lists(RUNNING, max_size=12),
    state=ENGINES,
    kept_free=st.sampled_from([0.0, 0.3]),
)
def test_what_surely_fits_fits_by_the_arrays(
    waiting: list[Request], old: list[Request], state: EngineState, kept_free: float
) -> None:
    queue = [request for request in waiting if request.kind is not ServiceKind.BEST_EFFORT]
    if not queue:
        return
    batch = RunningBatch(old, state, kept_free=kept_free)
    arrays = WaitingBatch.of(queue, WaitingArrays.of(queue), NOW)
    fits = arrays.fit(batch, NOW, np.arange(len(queue)))
    tokens = sum(request.uncached_tokens for request in queue)
    for at, request in enumerate(queue):
        if surely_fits(request, float(arrays.pace_s[at]), batch, NOW, tokens):
            assert fits[at]
