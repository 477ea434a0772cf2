"""The simulator against arithmetic by hand, and what holds of every run."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Sequence
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
from lab.records.run_record import RequestResult
from lab.simulate.predictions import Predicted, predict
from lab.simulate.replica import Replica
from lab.simulate.simulator import Simulated, simulate
from lab.workload import WorkloadRequest, make_workload

pytestmark = (
    pytest.mark.no_cover
)  # whole simulations, four times slower under a tracer; the rooms have tests of their own

HAND = Profile(
    name="hand",
    description="A step takes 10 ms, 1 ms for each prompt token and 1 ms for each sequence that decodes.",
    provenance={},
    regimes=(Regime(math.inf, 0.01, 0.0, 1e-3, 1e-3, 0.0, 0.0),),
    max_num_seqs=8,
    max_num_batched_tokens=1000,
    max_model_len=1000,
    kv_tokens=10_000,
)


def asked(at: float = 0.0, prompt: int = 100, output: int = 10, *, ttft: float = 60.0, tpot: float = 1.0,
          category: int = 1) -> WorkloadRequest:  # fmt: skip
    return WorkloadRequest(at, prompt, output, ttft, tpot, category)


def run(
    workload: Sequence[WorkloadRequest],
    policy: str | Callable[[], Policy] = "fcfs",
    profile: Profile = HAND,
    **options: Any,
) -> Simulated:
    make = policy if callable(policy) else lambda: make_policy(policy)
    return simulate(workload, predict("oracle", workload, 0), profile, make, **options)


def times(served: RequestResult) -> tuple[float | None, float, float | None]:
    return served.ttft_s, served.tpot_s, served.e2e_s


# --- by hand ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", STEP_MODES)
@pytest.mark.parametrize("policy", POLICIES)
def test_a_request_alone_takes_its_prefill_and_then_a_decode_step_a_token(policy: str, mode: str) -> None:
    came = run([asked(at=3.0)], policy, step_mode=mode)
    assert times(came.served[0]) == pytest.approx((0.11, 0.011, 0.11 + 9 * 0.011))
    assert came.duration_s == pytest.approx(3.0 + 0.11 + 9 * 0.011)
    assert came.busy_s == pytest.approx(0.11 + 9 * 0.011)
    assert (came.steps, came.preemptions) == (10, 0)


def test_an_answer_of_one_token_ends_with_its_prefill_and_has_no_tpot() -> None:
    assert times(run([asked(output=1)]).served[0]) == pytest.approx((0.11, 0.0, 0.11))


def test_a_prompt_beyond_the_budget_is_cut_in_chunked_steps_and_whole_in_the_others() -> None:
    narrow = replace(HAND, max_num_batched_tokens=40)
    assert run([asked()], profile=narrow).served[0].ttft_s == pytest.approx(0.05 + 0.05 + 0.03)
    assert run([asked()], profile=narrow, step_mode="prefill-first").served[0].ttft_s == pytest.approx(0.11)


TWO = [asked(0.0, 100, 3), asked(0.05, 50, 2)]


def test_two_that_overlap_in_chunked_steps() -> None:
    # 0 to 110 ms: a's prompt. To 171: a decodes beside b's prompt. To 183: both decode.
    came = run(TWO)
    assert times(came.served[0]) == pytest.approx((0.110, (0.183 - 0.110) / 2, 0.183))
    assert times(came.served[1]) == pytest.approx((0.171 - 0.05, 0.012, 0.183 - 0.05))
    assert (came.duration_s, came.steps) == (pytest.approx(0.183), 3)


def test_two_that_overlap_in_prefill_first_steps() -> None:
    # 0 to 110 ms: a's prompt. To 170: b's alone. To 182: both decode. To 193: a.
    came = run(TWO, step_mode="prefill-first")
    assert times(came.served[0]) == pytest.approx((0.110, (0.193 - 0.110) / 2, 0.193))
    assert times(came.served[1]) == pytest.approx((0.170 - 0.05, 0.012, 0.182 - 0.05))
    assert (came.duration_s, came.steps) == (pytest.approx(0.193), 4)


def test_an_engine_that_plans_a_step_ahead_takes_a_newcomer_a_step_later() -> None:
    # 0 to 110 ms: a's prompt. To 121: a decodes; that was settled before b came. To 182: both. To 193: b decodes.
    came = run(TWO, profile=replace(HAND, plans_ahead=True))
    assert times(came.served[0]) == pytest.approx((0.110, (0.182 - 0.110) / 2, 0.182))
    assert times(came.served[1]) == pytest.approx((0.182 - 0.05, 0.011, 0.193 - 0.05))
    assert (came.duration_s, came.steps) == (pytest.approx(0.193), 4)


def test_who_arrives_as_a_step_ends_is_in_the_next_one() -> None:
    end = HAND.step_seconds(0, 0, 100, 0)
    assert run([asked(), asked(at=end, prompt=50, output=1)]).served[1].ttft_s == pytest.approx(0.061)


def test_the_last_answer_is_waited_for_and_idle_time_is_nobodys_work() -> None:
    came = run([asked(), asked(at=100.0)])
    assert came.duration_s == pytest.approx(100.0 + 0.11 + 0.099)
    assert came.busy_s == pytest.approx(2 * (0.11 + 0.099))


def test_mooncake_rejects_at_arrival_by_the_step_times_of_the_profile() -> None:
    # At 50 ms the first prompt counts in full (it has no token yet): 110 and 110 ms.
    late = asked(0.05, ttft=0.2)
    came = run([asked(), late, replace(late, ttft_slo_s=0.25)], "mooncake", learn=False)
    assert [s.outcome for s in came.served] == ["finished", "rejected", "finished"]
    assert (came.served[1].reason, came.served[1].ttft_s) == ("ttft_unattainable", None)


def test_scorpio_rejects_who_waits_when_its_deadline_comes_too_near_and_ends_the_run_there() -> None:
    full = replace(HAND, max_num_seqs=1)
    came = run([asked(output=500), asked(0.2, ttft=1.0)], "scorpio", full, learn=False)
    assert [s.outcome for s in came.served] == ["finished", "rejected"]
    assert came.served[1].reason == "ttft_unattainable"
    only = run([asked(at=7.0, ttft=0.05)], "scorpio", learn=False)
    assert (only.served[0].outcome, only.duration_s, only.steps) == ("rejected", 7.0, 0)


@pytest.mark.parametrize("mode", STEP_MODES)
def test_under_scorpio_twice_the_bound_decodes_in_half_of_the_steps(mode: str) -> None:
    pair = [asked(prompt=10, output=121, tpot=0.03), asked(prompt=10, output=51, tpot=0.06)]
    strict, loose = run(pair, "scorpio", step_mode=mode).served
    assert loose.tpot_s == pytest.approx(2 * 0.0115, rel=0.02)
    assert strict.tpot_s == pytest.approx(0.0115, rel=0.05)
    strict, loose = run(pair, "ttft_guard_only", step_mode=mode).served
    assert loose.tpot_s == pytest.approx(0.012, rel=0.02), "without the TPOT guard there is no gate"


# --- what holds of every run ------------------------------------------------------------------------------------------

WORKLOADS = st.lists(
    st.builds(
        asked, st.floats(0, 2), st.integers(1, 300), st.integers(1, 30), ttft=st.floats(0.01, 3),
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
def test_every_request_ends_once_and_no_faster_than_steps_allow(
    policy: str, workload: list[WorkloadRequest], profile: Profile, mode: str, replicas: int, learn: bool
) -> None:
    came = run(workload, policy, profile, step_mode=mode, replicas=replicas, learn=learn)
    assert [served.asked for served in came.served] == workload
    latest = workload[-1].at_s
    for served in came.served:
        ask = served.asked
        if served.outcome == "rejected":
            assert (served.ttft_s, served.e2e_s) == (None, None)
            assert served.reason in {"ttft_unattainable", "tpot_unattainable"}
            continue
        assert served.outcome == "finished"
        assert served.ttft_s >= 0.01 + 1e-3 * ask.prompt_tokens - 1e-9
        assert served.tpot_s >= (0.011 - 1e-9 if ask.output_tokens > 1 else 0.0)
        assert served.e2e_s == pytest.approx(served.ttft_s + served.tpot_s * (ask.output_tokens - 1))
        latest = max(latest, ask.at_s + served.e2e_s)
    assert came.duration_s >= latest - 1e-9
    assert came.busy_s <= came.duration_s * replicas + 1e-9


@pytest.mark.parametrize("policy", POLICIES)
def test_the_same_workload_comes_out_the_same_to_the_last_bit(policy: str) -> None:
    workload = make_workload("small", qps=30, requests=40, seed=5)
    profile = replace(HAND, regimes=(Regime(math.inf, 0.01, 0.0, 1e-4, 1e-3, 1e-7, 0.0),), kv_tokens=2000)
    first, second = (run(workload, policy, profile, replicas=2) for _ in range(2))
    assert replace(first, scheduling_s=0) == replace(second, scheduling_s=0)


def test_twice_the_engines_do_the_work_in_half_the_time() -> None:
    burst = [asked(prompt=50, output=20) for _ in range(160)]
    one, two = (run(burst, replicas=replicas) for replicas in (1, 2))
    assert two.duration_s == pytest.approx(one.duration_s / 2, rel=0.02)
    assert two.busy_s == pytest.approx(one.busy_s, rel=0.02)


def test_a_newcomer_goes_to_the_engine_with_the_least_prefill_ahead_and_then_the_fewest_requests() -> None:
    # The second goes to the idle engine; the third too, for that one's prompt is the shorter.
    came = run([asked(prompt=500), asked(prompt=100), asked(prompt=50)], replicas=2)
    assert [s.ttft_s for s in came.served] == pytest.approx([0.51, 0.11, 0.11 + 0.061])


@pytest.mark.parametrize("mode", STEP_MODES)
def test_under_kv_pressure_sequences_are_preempted_and_everything_finishes(mode: str) -> None:
    tight = replace(HAND, max_model_len=200, kv_tokens=256)
    workload = [asked(at=0.001 * i, prompt=50, output=60) for i in range(6)]
    came, roomy = run(workload, profile=tight, step_mode=mode), run(workload, step_mode=mode)
    assert came.preemptions > 0
    assert roomy.preemptions == 0
    assert [s.outcome for s in came.served] == ["finished"] * 6
    assert came.duration_s > roomy.duration_s


def test_cost_grows_with_the_work_not_with_its_square() -> None:
    def cost(requests: int) -> tuple[int, int]:
        came = run([asked(at=0.05 * i, prompt=20, output=20) for i in range(requests)], "scorpio")
        assert came.decisions <= requests + came.steps
        return came.steps, came.decisions

    (steps, decisions), (twice_steps, twice_decisions) = cost(100), cost(200)
    assert twice_steps <= 2.1 * steps
    assert twice_decisions <= 2.1 * decisions


def test_no_requests_are_no_work() -> None:
    came = run([])
    assert (came.served, came.duration_s, came.steps) == ([], 0.0, 0)


def test_progress_is_told_and_never_runs_back() -> None:
    told: list[int] = []
    run([asked(at=0.01 * i, prompt=5, output=2) for i in range(200)], on_ended=told.append)
    assert told == sorted(set(told))
    assert told[-1] == 200


# --- the gateway's own decisions --------------------------------------------------------------------------------------


@dataclass
class Watched:
    """A policy, and a copy of everything that it was shown and answered."""

    policy: Policy
    seen: list[tuple[float, list[Request], list[Request], Decision]] = field(default_factory=list)

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
        shown = copy.deepcopy((list(waiting), list(running)))
        decision = self.policy.decide(now, waiting, running, engine)
        self.seen.append((now, *shown, copy.deepcopy(decision)))
        return decision


def test_a_replica_keeps_the_gateways_own_books() -> None:
    replica = Replica(HAND, make_policy("fcfs"))
    assert type(replica.admission) is AdmissionController


@pytest.mark.parametrize("policy", POLICIES)
def test_a_policy_decides_as_it_does_before_a_real_engine_shown_the_same(policy: str) -> None:
    watched = Watched(make_policy(policy))
    workload = make_workload("small", qps=14, requests=30, seed=3)
    came = run(workload, lambda: watched, learn=False)
    assert len(watched.seen) == came.decisions >= 30
    # What a gateway knows of such an engine, and nothing of how long answers will really be.
    engine = EngineState(
        alive=True,
        max_num_seqs=8,
        max_num_batched_tokens=1000,
        step_time=StepTimeModel(times=HAND.step_times(), learn=False),
    )
    afresh = make_policy(policy)  # one for all: it may remember what it decided
    for now, waiting, running, decision in watched.seen:
        queue = WaitingQueue(watched.order)
        for request in sorted(waiting, key=lambda r: r.arrival_s):
            queue.add(request)
        again = afresh.decide(now, queue, running, engine)
        assert [r.id for r in again.admit] == [r.id for r in decision.admit]
        assert [(r.request.id, r.bound) for r in again.reject] == [(r.request.id, r.bound) for r in decision.reject]


def test_a_policy_sees_who_runs_and_who_has_a_token_and_nobody_who_has_left() -> None:
    watched = Watched(make_policy("fcfs"))
    # a: prompt until 110 ms, then a token every 11 ms, nine of them.
    run([asked(), asked(at=0.05), asked(at=0.15, output=1), asked(at=5.0)], lambda: watched)
    seen = [[(r.id, r.generated, r.first_token_s is not None) for r in running] for _, _, running, _ in watched.seen]
    assert seen == [[], [("0", 0, False)], [("0", 1, True), ("1", 0, False)], []]


def test_nobody_hears_of_a_step_before_it_ends_even_where_the_next_is_planned_by_then() -> None:
    watched = Watched(make_policy("fcfs"))
    ahead = replace(HAND, plans_ahead=True)
    # The step of the first prompt ends at 110 ms, when its token is out, and not the next one that is planned by then.
    simulate(
        [asked(), asked(at=0.05), asked(at=0.1101)],
        [Predicted(9, 9)] * 3,
        ahead,
        lambda: watched,
    )
    shown = [[r.generated for r in running] for _, _, running, _ in watched.seen]
    assert shown == [[], [0], [1, 0]]


def test_a_policy_that_always_wants_to_look_again_cannot_stop_time() -> None:
    class Restless(Watched):
        def decide(self, now: float, waiting: Any, running: Any, engine: Any) -> Decision:
            return super().decide(now, waiting, running, engine) if now > 0.5 else Decision(recheck_at=now)

    assert run([asked()], lambda: Restless(make_policy("fcfs"))).served[0].outcome == "finished"


def test_the_gateway_is_told_the_prediction_and_not_the_truth() -> None:
    watched = Watched(make_policy("s3"))
    workload = [asked(output=500), asked(output=3)]
    simulate(workload, predict("constant", workload, 0), HAND, lambda: watched)
    shown = {
        r.id: (r.predicted_tokens, r.arrival_s, r.slo.ttft_s) for _, waiting, _, _ in watched.seen for r in waiting
    }
    assert shown == {"0": (251.5, 0.0, 60.0), "1": (251.5, 0.0, 60.0)}


def test_step_times_are_learnt_in_the_run_unless_they_are_held() -> None:
    # The profile fitted over its range says 0.01 s and 1 ms a sequence; a twisted start is put right by what is seen.
    kept: list[EngineState] = []

    class Keeping(Watched):
        def decide(self, now: float, waiting: Any, running: Any, engine: EngineState) -> Decision:
            kept.append(engine)
            return self.policy.decide(now, waiting, running, engine)

    workload = [asked(at=0.1 * i, prompt=20 + i, output=30) for i in range(30)]
    for learn in (True, False):
        run(workload, lambda: Keeping(make_policy("fcfs")), learn=learn)
    learnt, held = kept[0].step_time, kept[-1].step_time
    assert (learnt.steps_seen > 100, held.steps_seen) == (True, 0)
    assert held.times == HAND.step_times()
    assert learnt.itl(4, 50) == pytest.approx(0.014, rel=0.05)


class Silent(Watched):
    """Admits the first request it ever sees, and then decides no more."""

    def decide(self, now: float, waiting: Any, running: Any, engine: EngineState) -> Decision:
        self.seen.append((now, [], [], Decision()))
        return Decision(admit=[waiting[0]] if len(self.seen) == 1 else [])


def test_a_policy_that_leaves_requests_waiting_before_an_idle_engine_is_reported() -> None:
    with pytest.raises(RuntimeError, match="2 requests wait before idle engines, and the policy will not decide"):
        run([asked(), asked(at=0.05), asked(at=9)], lambda: Silent(make_policy("fcfs")))


def test_a_request_that_no_engine_can_hold_is_refused_with_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"a request of 1010 tokens.*'hand' holds 1000.*--max-prompt and --max-output"):
        run([asked(), asked(prompt=1000)])
    assert run([asked(prompt=990)]).served[0].outcome == "finished"


def test_unknown_steps_and_too_little_memory_are_refused() -> None:
    with pytest.raises(ValueError, match="use one of chunked, prefill-first"):
        run([asked()], step_mode="whole")
    with pytest.raises(ValueError, match=r"kv_tokens \(999\) must hold one sequence"):
        run([asked()], profile=replace(HAND, kv_tokens=999))


def test_while_no_bound_is_at_risk_slack_makes_the_very_steps_of_stock_vllm() -> None:
    # Busy enough that batches form, with bounds so loose that no step can break one.
    asked = make_workload("sharegpt", qps=15.0, duration_s=10.0, seed=1, slo_scale=10.0)
    predictions, profile = predict("shipped", asked, 1), load_profile("a100-llama3.1-8b")
    stock, ours = (
        simulate(asked, predictions, profile, lambda name=name: make_policy(name)) for name in ("fcfs", "slack")
    )
    assert len(asked) > 100
    assert ours.served == stock.served
    assert (ours.steps, ours.busy_s) == (stock.steps, stock.busy_s)


def test_a_tenant_with_costly_requests_is_not_below_its_floor_at_three_times_what_stock_vllm_bears() -> None:
    asked = make_workload("sharegpt", qps=70.0, duration_s=20.0, seed=2)
    predictions, profile = predict("shipped", asked, 2), load_profile("a100-llama3.1-8b")
    dearest = sorted(p.tokens for p in predictions)[int(0.8 * len(asked))]

    def adherence(floor: float) -> tuple[float, float]:
        """Of the tenant whose answers are the longest fifth, and of everybody."""
        tenants = ["dear" if p.tokens > dearest else "others" for p in predictions]
        came = simulate(asked, predictions, profile, lambda: make_policy("slack", {"floor": floor}), tenants=tenants)
        attained = [served.attained for served in came.served]
        dear = [ok for ok, p in zip(attained, predictions, strict=True) if p.tokens > dearest]
        return sum(dear) / len(dear), sum(attained) / len(attained)

    without, everybody = adherence(0.0)
    assert without < 0.55 * everybody
    dear, with_a_floor = adherence(0.8)
    assert dear > 0.8 * with_a_floor - 0.02
    assert with_a_floor > everybody - 0.03, "fairness costs next to nothing"
