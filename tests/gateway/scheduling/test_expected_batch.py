"""The batch by which a router compares engines: it follows each change as new sums would."""

from __future__ import annotations

import math

import pytest

from engine_adapter.engine import EngineState
from engine_adapter.service_kind import ServiceKind
from engine_adapter.simulated.engine import SimulatedEngine
from gateway.policies.registry import make_policy
from gateway.policies.running_batch import RunningBatch
from gateway.scheduling.admission import AdmissionController
from gateway.scheduling.engine_queue import EngineQueue
from gateway.scheduling.expected_batch import MAX_AGE_S, ExpectedBatch
from tests.fixtures.policy_builders import make_request, running

SUMS = (
    "slots",
    "best_effort_slots",
    "decoding",
    "context",
    "memory",
    "backlog",
    "prefill_s",
    "strictest_s",
    "step_s",
)


def controller() -> AdmissionController:
    return AdmissionController(make_policy("slack"), EngineState(alive=True, max_num_seqs=64))


def sums(batch: ExpectedBatch) -> dict[str, float]:
    return {name: getattr(batch, name) for name in SUMS}


def new_sums(admission: AdmissionController) -> dict[str, float]:
    return sums(ExpectedBatch(admission.running.values(), admission.waiting, admission.engine, math.inf))


def test_expected_batch_follows_arrival_first_token_and_end() -> None:
    admission = controller()
    assert admission.expected_batch(0.0).slots == 0
    request = make_request("one", prompt=300, tpot=0.05)
    admission.submit(request)
    assert (admission.expected_batch(0.0).slots, admission.expected_batch(0.0).backlog) == (1, 300)
    admission.decide(0.0)
    assert (admission.expected_batch(0.0).slots, admission.expected_batch(0.0).backlog) == (1, 300)
    request.first_token_s = 0.1
    admission.on_first_token(request)
    assert (admission.expected_batch(0.1).slots, admission.expected_batch(0.1).backlog) == (1, 0)
    admission.leave(request)
    assert admission.expected_batch(0.1).slots == 0


@pytest.mark.parametrize("decodes", [0, 60])
def test_router_sees_what_others_have_on_the_engine(decodes: int) -> None:
    admission = controller()
    engine = admission.engine
    engine.kv_tokens, engine.foreign_sequences, engine.foreign_tokens = 10_000, 60, 9_000.0
    engine.foreign_decodes = decodes
    batch = admission.expected_batch(0.0)
    assert (batch.slots, batch.memory) == (60, 9_000)
    assert (batch.decoding, batch.context) == ((60, 9_000) if decodes else (0, 0))
    assert not batch.has_room_for(make_request("long", prompt=900, output=200)), "memory"
    assert not batch.has_room_for(make_request("many", prompt=10, output=10, sequences=5)), "slots"
    assert batch.has_room_for(make_request("short", prompt=100, output=100))
    request = make_request("one", prompt=100, output=100)
    admission.submit(request)
    assert batch.slots == 61
    admission.withdraw(request)
    assert sums(admission.expected_batch(0.0)) == pytest.approx(new_sums(admission))


def test_admission_counts_the_time_of_foreign_decodes_but_not_their_slots_and_memory() -> None:
    """Else requests would wait for ever for an engine that others fill; so they wait in its queue beside theirs."""
    engine = EngineState(alive=True, max_num_seqs=64, kv_tokens=10_000)
    engine.foreign_sequences = engine.foreign_decodes = 64
    engine.foreign_tokens = 9_900.0
    batch = RunningBatch((), engine)
    assert batch.step_s == engine.step_time.curve.step_s(64, 9_900)
    assert (batch.slots, batch.memory) == (0, 0)
    assert batch.has_room_for(make_request("one", prompt=900, output=200))


def test_expected_batch_without_a_request_equals_new_sums() -> None:
    admission = controller()
    for number, pace_s in enumerate((0.03, 0.05, 0.05, None)):
        request = running(f"{number}", prompt=100 * (1 + number), tpot=pace_s, generated=10 * number)
        admission.running[request.id] = request
    batch = admission.expected_batch(0.0)
    for number in (3, 1):
        admission.leave(admission.running[f"{number}"])
        assert admission.expected_batch(0.0) is batch, "one change needs no new sums"
        assert sums(batch) == pytest.approx(new_sums(admission))


def test_expected_batch_is_made_again_when_the_strictest_pace_leaves() -> None:
    admission = controller()
    for name, pace_s in (("a", 0.03), ("b", 0.03), ("c", 0.05)):
        admission.running[name] = running(name, tpot=pace_s)
    strictest = [admission.expected_batch(0.0).strictest_s]
    for name in ("a", "b", "c"):
        admission.leave(admission.running[name])
        strictest.append(admission.expected_batch(0.0).strictest_s)
    assert strictest == [0.03, 0.03, 0.05, math.inf]


def test_expected_batch_removes_the_prompt_that_it_added() -> None:
    admission = controller()
    first, second = make_request("first", prompt=300, tpot=0.05), make_request("second", prompt=200, tpot=0.05)
    admission.submit(first)
    admission.submit(second)
    assert admission.expected_batch(0.0).backlog == 500
    first.cached_tokens = 250  # as the engine reports when it begins the prompt
    admission.on_first_token(first)
    assert admission.expected_batch(0.0).backlog == 200


def test_expected_batch_counts_grown_contexts_after_a_while() -> None:
    admission = controller()
    request = admission.running["one"] = running("one", prompt=300, tpot=0.05, generated=0)
    assert admission.expected_batch(0.0).context == 300
    request.advance(10)
    assert admission.expected_batch(MAX_AGE_S).context == 300
    assert admission.expected_batch(1.01 * MAX_AGE_S).context == 310


def test_batches_of_many_engines_are_not_all_made_again_by_one_decision() -> None:
    policy = make_policy("slack")
    names = [f"main-{number}" for number in range(100)]
    controllers = [EngineQueue(SimulatedEngine(name=name), policy, {}).admission for name in names]
    for admission in controllers:
        admission.running["one"] = running("one", prompt=300)
    made = [admission.expected_batch(0.0) for admission in controllers]
    again = []
    for at in range(1, 11):
        batches = [admission.expected_batch(at * MAX_AGE_S / 10) for admission in controllers]
        again.append(sum(new is not old for new, old in zip(batches, made, strict=True)))
        made = batches
    assert sum(again) >= 90
    assert max(again) <= 30


def test_expected_batch_of_an_admitted_request_equals_new_sums() -> None:
    admission = controller()
    for name, bounds in (("paced", {"tpot": 0.05}), ("whole", {"e2e": 30.0}), ("free", {})):
        admission.submit(make_request(name, prompt=300, output=400, **bounds))
    admission.expected_batch(0.0)
    assert len(admission.decide(0.0).admit) == 3
    assert sums(admission.expected_batch(0.0)) == pytest.approx(new_sums(admission))


def test_expected_batch_follows_the_prefix_hits_of_waiting_requests() -> None:
    admission = controller()
    admission.engine.kv_tokens = 100_000
    for number in range(5):
        request = make_request(f"{number}", prompt=1605, tpot=0.05)
        request.blocks, request.block_tokens = tuple(range(100)), 16
        admission.submit(request)
    assert admission.expected_batch(0.0).backlog == 5 * 1605
    admission.prefixes.stored(range(100), 16)
    admission.decide(0.0)
    admission.decide(0.01)
    batch = admission.expected_batch(0.01)
    assert batch.backlog == 5 * 5
    assert sums(batch) == pytest.approx(new_sums(admission))


def test_expected_batch_forgets_a_withdrawn_request() -> None:
    admission = controller()
    request = make_request("one", prompt=300, tpot=0.05)
    admission.submit(request)
    admission.submit(make_request("other", prompt=200, tpot=0.05))
    batch = admission.expected_batch(0.0)
    assert batch.slots == 2
    admission.withdraw(request)
    assert admission.expected_batch(0.0) is batch
    assert sums(batch) == pytest.approx(new_sums(admission))


def test_expected_batch_forgets_a_rejected_request() -> None:
    admission = controller()
    late = make_request("late", at=-10.0, ttft=1.0, prompt=300, tpot=0.05)
    admission.submit(late)
    admission.submit(make_request("other", prompt=200, tpot=0.05))
    batch = admission.expected_batch(0.0)
    assert [rejection.request for rejection in admission.decide(0.0).reject] == [late]
    assert admission.expected_batch(0.0) is batch
    assert (batch.slots, batch.backlog) == (1, 200)


def test_expected_batch_counts_a_yielding_prompt_as_prefill_work_only() -> None:
    admission = controller()
    request = admission.running["one"] = running("one", prompt=300, tpot=0.05, generated=0, first_token_s=None)
    request.kind = ServiceKind.YIELDING
    batch = admission.expected_batch(0.0)
    assert (batch.backlog, batch.prefill_s) == (0, admission.engine.step_time.prefill(300))
    admission.on_first_token(request)
    assert (batch.backlog, batch.prefill_s) == (0, 0.0)
