"""The simulator: properties of every run, and what policies see."""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_adapter.engine import EngineState
from engine_adapter.simulated.scheduler import STEP_MODES
from engine_adapter.step_time.model import StepTimeModel
from engine_adapter.step_time.profile import Profile, Regime, load_profile
from gateway.policies.base import Decision, Policy
from gateway.policies.registry import POLICIES, make_policy
from gateway.requests.request import Request
from gateway.requests.waiting_queue import WaitingQueue
from gateway.scheduling.admission import AdmissionController
from gateway.scheduling.routing import ROUTINGS
from lab.simulate.predictions import PredictedLength, predict
from lab.simulate.replica import Replica
from lab.simulate.simulator import simulate
from lab.workload import WorkloadRequest, make_workload
from tests.fixtures.simulations import HAND, request, run

# Whole simulations are four times slower under a coverage tracer; unit tests cover the same code.
pytestmark = pytest.mark.no_cover


# --- properties of every run ------------------------------------------------------------------------------------------

WORKLOADS = st.lists(
    st.builds(
        request, st.floats(0, 2), st.integers(1, 300), st.integers(1, 30), ttft=st.floats(0.01, 3),
        tpot=st.floats(0.005, 0.1), category=st.integers(1, 6),
    ),
    min_size=1, max_size=12,
).map(lambda workload: sorted(workload, key=lambda a: a.at_s))  # fmt: skip
ENGINES = st.builds(
    lambda seqs, tokens, kv, ahead: replace(
        HAND, max_num_seqs=seqs, max_num_batched_tokens=tokens, max_model_len=330, kv_tokens=kv, plans_ahead=ahead
    ),
    st.integers(1, 8), st.integers(8, 400), st.integers(330, 1200), st.booleans(),
)  # fmt: skip


@pytest.mark.parametrize("policy", POLICIES)
@given(WORKLOADS, ENGINES, st.sampled_from(STEP_MODES), st.integers(1, 3), st.booleans())
def test_every_request_ends_once_within_step_time_limits(
    policy: str, workload: list[WorkloadRequest], profile: Profile, mode: str, replicas: int, learn: bool
) -> None:
    result = run(workload, policy, profile, step_mode=mode, replicas=replicas, learn=learn)
    assert [one.request for one in result.results] == workload
    latest = workload[-1].at_s
    for one in result.results:
        sent = one.request
        if one.outcome == "rejected":
            assert (one.ttft_s, one.e2e_s) == (None, None)
            assert one.reason in {"ttft_unattainable", "tpot_unattainable"}
            continue
        assert one.outcome == "finished"
        assert one.ttft_s >= 0.01 + 1e-3 * sent.prompt_tokens - 1e-9
        assert one.tpot_s >= (0.011 - 1e-9 if sent.output_tokens > 1 else 0.0)
        assert one.e2e_s == pytest.approx(one.ttft_s + one.tpot_s * (sent.output_tokens - 1))
        latest = max(latest, sent.at_s + one.e2e_s)
    assert result.duration_s >= latest - 1e-9
    assert result.busy_s <= result.duration_s * replicas + 1e-9


@pytest.mark.parametrize("policy", POLICIES)
def test_simulation_is_deterministic(policy: str) -> None:
    workload = make_workload("small", qps=30, requests=40, seed=5)
    profile = replace(HAND, regimes=(Regime(math.inf, 0.01, 0.0, 1e-4, 1e-3, 1e-7, 0.0),), kv_tokens=2000)
    first, second = (run(workload, policy, profile, replicas=2) for _ in range(2))
    assert replace(first, scheduling_s=0, routing_s=0) == replace(second, scheduling_s=0, routing_s=0)


@pytest.mark.parametrize("name", ROUTINGS)
def test_routing_changes_nothing_with_one_replica(name: str) -> None:
    workload = make_workload("small", qps=30, requests=60, seed=5)
    plain, routed = run(workload, "slack"), run(workload, "slack", routing=name)
    assert plain.results == routed.results
    assert (plain.decisions, plain.steps, routed.routing_s) == (routed.decisions, routed.steps, 0.0)


@pytest.mark.parametrize("name", ROUTINGS)
def test_every_request_ends_once_with_any_routing(name: str) -> None:
    workload = make_workload("small", qps=200, requests=120, seed=5)
    result = run(workload, "slack", replicas=4, routing=name)
    assert [one.request for one in result.results] == workload
    assert result.routing_s > 0


def test_replicas_take_turns_with_the_profiles() -> None:
    slow = replace(HAND, regimes=(Regime(math.inf, 0.5, 0.0, 0.0, 0.0, 0.0, 0.0),))
    burst = [request(prompt=50, output=4) for _ in range(3)]
    fast_only = run(burst, profile=[HAND], replicas=3, routing="round_robin")
    mixed = run(burst, profile=[HAND, slow], replicas=3, routing="round_robin")
    latencies = [
        (one.e2e_s or 0.0) / (other.e2e_s or 1.0) for one, other in zip(mixed.results, fast_only.results, strict=True)
    ]
    assert (latencies[0], latencies[2]) == (1.0, 1.0)
    assert latencies[1] > 2


def test_two_replicas_halve_the_duration() -> None:
    burst = [request(prompt=50, output=20) for _ in range(160)]
    one, two = (run(burst, replicas=replicas) for replicas in (1, 2))
    assert two.duration_s == pytest.approx(one.duration_s / 2, rel=0.02)
    assert two.busy_s == pytest.approx(one.busy_s, rel=0.02)


def test_request_goes_to_replica_with_least_queued_prefill() -> None:
    # The second request goes to the idle engine. So does the third, because the prompt there is shorter.
    result = run([request(prompt=500), request(prompt=100), request(prompt=50)], replicas=2)
    assert [s.ttft_s for s in result.results] == pytest.approx([0.51, 0.11, 0.11 + 0.061])


@pytest.mark.parametrize("mode", STEP_MODES)
def test_kv_pressure_preempts_and_every_request_finishes(mode: str) -> None:
    tight = replace(HAND, max_model_len=200, kv_tokens=256)
    workload = [request(at=0.001 * i, prompt=50, output=60) for i in range(6)]
    result, roomy = run(workload, profile=tight, step_mode=mode), run(workload, step_mode=mode)
    assert result.preemptions > 0
    assert roomy.preemptions == 0
    assert [s.outcome for s in result.results] == ["finished"] * 6
    assert result.duration_s > roomy.duration_s


def test_steps_and_decisions_grow_linearly_with_requests() -> None:
    def cost(requests: int) -> tuple[int, int]:
        result = run([request(at=0.05 * i, prompt=20, output=20) for i in range(requests)], "scorpio")
        assert result.decisions <= requests + result.steps
        return result.steps, result.decisions

    (steps, decisions), (twice_steps, twice_decisions) = cost(100), cost(200)
    assert twice_steps <= 2.1 * steps
    assert twice_decisions <= 2.1 * decisions


def test_empty_workload_gives_empty_result() -> None:
    result = run([])
    assert (result.results, result.duration_s, result.steps) == ([], 0.0, 0)


def test_on_ended_is_called_with_increasing_counts() -> None:
    counts: list[int] = []
    run([request(at=0.01 * i, prompt=5, output=2) for i in range(200)], on_ended=counts.append)
    assert counts == sorted(set(counts))
    assert counts[-1] == 200


# --- decisions of the policy ------------------------------------------------------------------------------------------


@dataclass
class RecordingPolicy:
    """A policy that records a copy of its inputs and decisions."""

    policy: Policy
    calls: list[tuple[float, list[Request], list[Request], Decision]] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.policy.name

    @property
    def gate(self) -> str:
        return self.policy.gate

    def order(self, request: Request) -> tuple[float, ...]:
        return self.policy.order(request)

    def decide(
        self, now: float, waiting: Sequence[Request], running: Collection[Request], engine: EngineState
    ) -> Decision:
        inputs = copy.deepcopy((list(waiting), list(running)))
        decision = self.policy.decide(now, waiting, running, engine)
        self.calls.append((now, *inputs, copy.deepcopy(decision)))
        return decision


def test_replica_uses_admission_controller_of_the_gateway() -> None:
    replica = Replica(HAND, make_policy("fcfs"))
    assert type(replica.admission) is AdmissionController


@pytest.mark.parametrize("policy", POLICIES)
def test_policy_decides_as_with_a_live_engine_on_same_inputs(policy: str) -> None:
    recorder = RecordingPolicy(make_policy(policy))
    workload = make_workload("small", qps=14, requests=30, seed=3)
    result = run(workload, lambda: recorder, learn=False)
    assert len(recorder.calls) == result.decisions >= 30
    # The engine state that a gateway has; true output lengths are not part of it.
    engine = EngineState(
        alive=True,
        max_num_seqs=8,
        max_num_batched_tokens=1000,
        step_time=StepTimeModel(times=HAND.step_times(), learn=False),
    )
    replay = make_policy(policy)  # one instance for all calls, because a policy may keep state
    for now, waiting, running, decision in recorder.calls:
        queue = WaitingQueue(recorder.order)
        for waiting_request in sorted(waiting, key=lambda r: r.arrival_s):
            queue.add(waiting_request)
        replayed = replay.decide(now, queue, running, engine)
        assert [r.id for r in replayed.admit] == [r.id for r in decision.admit]
        assert [(r.request.id, r.bound) for r in replayed.reject] == [(r.request.id, r.bound) for r in decision.reject]


def test_policy_sees_running_requests_and_their_progress() -> None:
    recorder = RecordingPolicy(make_policy("fcfs"))
    # The first request prefills until 110 ms, then decodes nine tokens, one every 11 ms.
    run([request(), request(at=0.05), request(at=0.15, output=1), request(at=5.0)], lambda: recorder)
    running_states = [
        [(r.id, r.generated, r.first_token_s is not None) for r in running] for _, _, running, _ in recorder.calls
    ]
    assert running_states == [[], [("0", 0, False)], [("0", 1, True), ("1", 0, False)], []]


def test_policy_sees_step_outcome_only_at_step_end_when_async() -> None:
    recorder = RecordingPolicy(make_policy("fcfs"))
    ahead = replace(HAND, plans_ahead=True)
    # The step of the first prompt ends at 110 ms. The next step is planned by then, but its outcome is not visible.
    simulate(
        [request(), request(at=0.05), request(at=0.1101)],
        [PredictedLength(9, 9)] * 3,
        ahead,
        lambda: recorder,
    )
    generated = [[r.generated for r in running] for _, _, running, _ in recorder.calls]
    assert generated == [[], [0], [1, 0]]


def test_immediate_recheck_does_not_stop_virtual_time() -> None:
    class Restless(RecordingPolicy):
        def decide(self, now: float, waiting: Any, running: Any, engine: Any) -> Decision:
            return super().decide(now, waiting, running, engine) if now > 0.5 else Decision(recheck_at=now)

    assert run([request()], lambda: Restless(make_policy("fcfs"))).results[0].outcome == "finished"


def test_policy_sees_predicted_and_not_true_lengths() -> None:
    recorder = RecordingPolicy(make_policy("s3"))
    workload = [request(output=500), request(output=3)]
    simulate(workload, predict("constant", workload, 0), HAND, lambda: recorder)
    inputs = {
        r.id: (r.predicted_tokens, r.arrival_s, r.slo.ttft_s) for _, waiting, _, _ in recorder.calls for r in waiting
    }
    assert inputs == {"0": (251.5, 0.0, 60.0), "1": (251.5, 0.0, 60.0)}


def test_step_times_are_learned_only_with_learn() -> None:
    # The true step time of 4 decodes is 0.01 s + 4 * 1 ms.
    states: list[EngineState] = []

    class StateRecorder(RecordingPolicy):
        def decide(self, now: float, waiting: Any, running: Any, engine: EngineState) -> Decision:
            states.append(engine)
            return self.policy.decide(now, waiting, running, engine)

    workload = [request(at=0.1 * i, prompt=20 + i, output=30) for i in range(30)]
    for learn in (True, False):
        run(workload, lambda: StateRecorder(make_policy("fcfs")), learn=learn)
    learned, fixed = states[0].step_time, states[-1].step_time
    assert (learned.steps_seen > 100, fixed.steps_seen) == (True, 0)
    assert fixed.times == HAND.step_times()
    assert learned.itl(4, 50) == pytest.approx(0.014, rel=0.05)


class Silent(RecordingPolicy):
    """Admits only the first request."""

    def decide(self, now: float, waiting: Any, running: Any, engine: EngineState) -> Decision:
        self.calls.append((now, [], [], Decision()))
        return Decision(admit=[waiting[0]] if len(self.calls) == 1 else [])


def test_policy_that_never_admits_raises() -> None:
    with pytest.raises(RuntimeError, match="2 requests wait, but every engine is idle"):
        run([request(), request(at=0.05), request(at=9)], lambda: Silent(make_policy("fcfs")))


def test_request_above_context_length_raises() -> None:
    with pytest.raises(ValueError, match=r"a request of 1010 tokens.*'hand' is 1000.*--max-prompt and --max-output"):
        run([request(), request(prompt=1000)])
    assert run([request(prompt=990)]).results[0].outcome == "finished"


def test_unknown_step_mode_and_small_kv_memory_raise() -> None:
    with pytest.raises(ValueError, match="use one of chunked, prefill-first"):
        run([request()], step_mode="whole")
    with pytest.raises(ValueError, match=r"kv_tokens \(999\) must hold one sequence"):
        run([request()], profile=replace(HAND, kv_tokens=999))


def test_slack_runs_the_steps_of_stock_vllm_at_loose_bounds() -> None:
    # The load is high enough for batches, and the bounds are too loose for any step to break one.
    workload = make_workload("sharegpt", qps=15.0, duration_s=10.0, seed=1, slo_scale=10.0)
    predictions, profile = predict("shipped", workload, 1), load_profile("a100-llama3.1-8b")
    stock, ours = (
        simulate(workload, predictions, profile, lambda name=name: make_policy(name)) for name in ("fcfs", "slack")
    )
    assert len(workload) > 100
    assert ours.results == stock.results
    assert (ours.steps, ours.busy_s) == (stock.steps, stock.busy_s)


def test_slack_keeps_fair_share_of_costly_tenant_under_overload() -> None:
    workload = make_workload("sharegpt", qps=70.0, duration_s=20.0, seed=2)
    predictions, profile = predict("shipped", workload, 2), load_profile("a100-llama3.1-8b")
    p80_tokens = sorted(p.tokens for p in predictions)[int(0.8 * len(workload))]
    costly = [p.tokens > p80_tokens for p in predictions]
    tenants = ["costly" if flag else "others" for flag in costly]

    def adherence(min_share: float) -> tuple[float, float]:
        """Return the adherence of the tenant with the longest fifth of answers, and of all requests."""
        policy = {"min_admission_share": min_share}
        result = simulate(workload, predictions, profile, lambda: make_policy("slack", policy), tenants=tenants)
        attained = [one.attained for one in result.results]
        of_costly = [ok for ok, flag in zip(attained, costly, strict=True) if flag]
        return sum(of_costly) / len(of_costly), sum(attained) / len(attained)

    # Tenants share engine time whatever `min_admission_share` says, so a tenant below its share is not rejected first.
    for min_share in (0.0, 0.8):
        of_costly, of_all = adherence(min_share)
        assert of_costly > of_all
