"""What `slack` computes with: array results equal those of one request at a time."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_adapter.engine import EngineState
from engine_adapter.gates.constants import SLACK
from engine_adapter.service_kind import ServiceKind
from engine_adapter.step_report import GateReport, StepReport
from engine_adapter.step_time.curve import SPENT
from engine_adapter.step_time.linear_forms import StepTimes
from engine_adapter.step_time.model import StepTimeModel
from gateway.policies.running_batch import RunningBatch
from gateway.policies.slack.batch import WaitingBatch
from gateway.requests.request import Request
from gateway.requests.waiting_arrays import WaitingArrays
from tests.fixtures.policy_builders import NOW, RUNNING, TIMES, WAITING, engine, make_request, running

PACED, BEST_EFFORT = ServiceKind.PACED, ServiceKind.BEST_EFFORT

PROMISED = WAITING.filter(lambda request: request.kind is not BEST_EFFORT)
"""Waiting requests that are not best-effort: those of a `WaitingBatch`."""


def waiting_batch(requests: list[Request]) -> WaitingBatch:
    return WaitingBatch.of(requests, WaitingArrays.of(requests), NOW)


def weight(request: Request) -> float:
    """Return how many sequences of ``request`` decode in a step, on average."""
    return request.sequences * (1 if request.kind is PACED else SLACK.best_effort_share)


def context(request: Request) -> float:
    """Return the tokens per sequence now, or of a waiting request the mean while it runs."""
    return request.length if request.admitted_s is not None else request.prompt_tokens + request.predicted_tokens / 2


def final_tokens(request: Request) -> float:
    """Return the memory that ``request`` is expected to reach."""
    generated = request.generated / request.sequences
    output = request.predicted_tokens if request.predicted_tokens > generated + 1 else generated + 1
    return (request.prompt_tokens + output) * request.sequences


# --- running requests -------------------------------------------------------------------------------------------------


@given(st.lists(RUNNING | WAITING, max_size=8), st.booleans())
def test_running_batch_sums_its_requests(requests: list[Request], preemptible: bool) -> None:
    state = engine(max_num_seqs=60, gate=GateReport(preemptible=preemptible))
    batch = RunningBatch(requests, state)
    preemptible_memory, best_effort_slots = 0.0, 0
    for request in requests:
        if request.kind is BEST_EFFORT:
            best_effort_slots += request.sequences
            if best_effort_slots > 3:  # a twentieth of 60
                preemptible_memory += final_tokens(request)
    sequences = sum(r.sequences for r in requests)
    assert (batch.slots, batch.best_effort_slots) == (sequences, best_effort_slots)
    assert batch.protected_slots == (3 if preemptible else 60)
    assert batch.free_slots == 60 - sequences + (max(0, best_effort_slots - 3) if preemptible else 0)
    assert batch.decoding == pytest.approx(sum(map(weight, requests)))
    assert batch.context == pytest.approx(sum(context(r) * weight(r) for r in requests))
    assert batch.strictest_s == min((r.pace_s for r in requests if r.kind is PACED), default=math.inf)
    assert batch.memory == pytest.approx(sum(map(final_tokens, requests)))
    assert batch.preemptible_memory == pytest.approx(preemptible_memory if preemptible else 0.0)
    assert batch.backlog == sum(r.prompt_tokens for r in requests if r.prefilling)


@given(st.lists(RUNNING, max_size=8), RUNNING | WAITING)
def test_running_batch_plus_one_equals_batch_of_all(requests: list[Request], one: Request) -> None:
    state = engine(max_num_seqs=60, gate=GateReport(preemptible=True))
    whole, grown = RunningBatch([*requests, one], state), RunningBatch(requests, state)
    before = grown.prefill_token_s
    grown.add((one,))
    for name in [*sorted(vars(whole).keys() - {"engine"}), "free_slots", "prefill_share", "prefill_token_s"]:
        assert getattr(grown, name) == pytest.approx(getattr(whole, name)), name
    assert before == RunningBatch(requests, state).prefill_token_s


def test_running_batch_plans_an_added_request_with_the_given_pace() -> None:
    batch = RunningBatch([running(tpot=0.05)], engine())
    batch.add((make_request(e2e=4.0),), 0.03)
    assert batch.strictest_s == 0.03
    batch.add((make_request(ttft=1.0), make_request()), 0.01)
    assert batch.strictest_s == 0.03, "only paced requests have a pace"


def test_deadline_only_request_keeps_its_slot_but_has_no_pace() -> None:
    deadline_only = running("deadline only", ttft=5)
    requests = [*(running(f"free{i}") for i in range(40)), deadline_only]
    batch = RunningBatch(requests, engine())
    assert deadline_only.kind is ServiceKind.DEADLINE_ONLY
    assert (batch.slots, batch.best_effort_slots, batch.strictest_s) == (41, 40, math.inf)
    assert batch.decoding == pytest.approx(41 * SLACK.best_effort_share)


@pytest.mark.parametrize(
    ("shared", "kv_tokens", "fits"),
    [(0, 13_250, True), (0, 13_249, False), (19_000, 12_100, True), (19_000, 11_000, False)],
)
def test_preemption_does_not_free_memory_that_is_shared(shared: int, kv_tokens: int, fits: bool) -> None:
    """Twenty best-effort requests of 1,050 tokens may share a prompt of 1,000. All but three may be preempted.

    The rest then needs 9,050 + 1,000 + 3 * 50 tokens, and the new request 1,050: more than 11,000.
    """
    best_effort = [running(f"{i}", prompt=1000) for i in range(20)]
    state = engine(max_num_seqs=60, kv_tokens=kv_tokens, gate=GateReport(preemptible=True), shared_tokens=shared)
    batch = RunningBatch([running("paced", tpot=1.0, prompt=9000), *best_effort], state)
    assert batch.preemptible_memory == 17 * 1050
    request = make_request(ttft=100.0, tpot=1.0, prompt=1000)
    assert waiting_batch([request]).fit(batch, NOW, np.array([0])).tolist() == [fits]


def test_sequences_of_one_request_share_a_prompt() -> None:
    one, four = (RunningBatch([running(tpot=0.1, prompt=400, sequences=n)], engine()) for n in (1, 4))
    assert four.decoding == 4 * one.decoding
    requests = [make_request(tpot=1.0, prompt=400), make_request(tpot=1.0, prompt=400, sequences=4)]
    idle = RunningBatch([], engine())
    single, several = waiting_batch(requests).cost_s(idle) - idle.prefill_token_s * 400
    assert several == pytest.approx(4 * single)


@given(st.lists(RUNNING, max_size=8))
def test_chunk_fills_the_strictest_pace_at_most(requests: list[Request]) -> None:
    batch = RunningBatch(requests, engine())
    lookahead, most = batch.lookahead(1.0), batch.engine.max_num_batched_tokens
    chunk = lookahead.limit
    assert (lookahead.tokens, batch.lookahead(2.0).limit) == (batch.backlog, 2 * chunk)
    assert 1 <= chunk <= most
    if chunk > 1:
        assert batch.step_s + batch.prefill_token_s * chunk <= batch.strictest_s * (1 + 1e-9)
    if chunk < most:
        assert batch.step_s + batch.prefill_token_s * chunk >= batch.strictest_s * (1 - 1e-9)


@given(st.lists(RUNNING, max_size=8))
def test_prefill_share_is_what_decodes_leave_of_the_strictest_pace(requests: list[Request]) -> None:
    batch = RunningBatch(requests, engine())
    left = 1.0 if batch.strictest_s == math.inf else (batch.strictest_s - batch.step_s) / batch.strictest_s
    assert batch.prefill_share == pytest.approx(max(left, SLACK.min_prefill_share))


@pytest.mark.parametrize("preemptible", [False, True])
def test_free_slots_include_unprotected_best_effort_requests(preemptible: bool) -> None:
    state = engine(max_num_seqs=40, gate=GateReport(preemptible=preemptible))  # two slots are reserved
    for best_effort, paced, free in ((0, 40, 0), (2, 38, 0), (5, 35, 3), (5, 36, 2), (5, 39, -1), (40, 0, 38)):
        requests = [*(running() for _ in range(best_effort)), *(running(tpot=1.0) for _ in range(paced))]
        expected = free if preemptible else 40 - best_effort - paced
        assert RunningBatch(requests, state).free_slots == expected


def test_backlog_counts_prompts_without_a_first_token() -> None:
    prefilling = running("prefilling", tpot=1.0, prompt=300, first_token_s=None)
    unobserved = running("unobserved", tpot=1.0, prompt=70, first_token_s=None, unobserved=True)
    several = running("several", tpot=1.0, prompt=11, sequences=4, first_token_s=None)
    batch = RunningBatch([running(tpot=1.0, prompt=900), prefilling, unobserved, several], engine())
    assert batch.backlog == 311, "the sequences of a request share its prompt"
    batch.add((make_request("new", prompt=5),), math.inf)
    assert batch.backlog == 316


def test_full_steps_take_the_time_that_the_running_requests_have_gained() -> None:
    decoding = running("decoding", tpot=0.02, generated=100, first_token_s=NOW - 1.0)
    batch = RunningBatch([decoding], engine(), now=NOW)
    full_s = batch.engine.step_time.curve.step_s(1, batch.context, batch.engine.max_num_batched_tokens)
    assert batch.due_s == pytest.approx(NOW + 1.0), "100 tokens are due in 2 s, and took 1 s"
    tokens, token_s = batch.full_steps
    most = batch.engine.max_num_batched_tokens
    assert token_s == pytest.approx(full_s / most)
    # A full step uses its time less the pace of the token that it brings.
    assert tokens == pytest.approx((SPENT * 1.0 - 0.02) / (full_s - 0.02) * most)


@pytest.mark.parametrize(
    ("generated", "first_ago_s"), [(50, 1.0), (40, 1.0)], ids=["at its pace", "late, so it limits no step"]
)
def test_full_steps_take_nothing_without_gained_time(generated: int, first_ago_s: float) -> None:
    punctual = running("punctual", tpot=0.02, generated=51, first_token_s=NOW - 1.0)
    other = running("other", tpot=0.02, generated=generated, first_token_s=NOW - first_ago_s)
    assert RunningBatch([punctual, other], engine(), now=NOW).full_steps == (0.0, 0.0)


def test_prompts_take_full_steps_while_nothing_decodes() -> None:
    prefilling = running("prefilling", tpot=0.02, prompt=300, first_token_s=None)
    assert RunningBatch([prefilling], engine(), now=NOW).full_steps[0] == 300
    unpaced = running("unpaced", tpot=None, first_token_s=NOW - 1.0)
    assert RunningBatch([unpaced], engine(), now=NOW).full_steps == (0.0, 0.0), "nothing limits a step"


# --- waiting requests -------------------------------------------------------------------------------------------------


@given(st.lists(PROMISED, min_size=1, max_size=6))
def test_waiting_batch_paces_equal_those_of_each_request(requests: list[Request]) -> None:
    for pace_s, request in zip(waiting_batch(requests).pace_s.tolist(), requests, strict=True):
        expected = math.inf if request.slo.tpot_s is None else request.slo.tpot_s
        if request.slo.e2e_s is not None:
            left_s = request.arrival_s + request.slo.e2e_s - min(NOW, request.deadline_s)
            expected = min(left_s / request.predicted_tokens, expected)
        assert pace_s == pytest.approx(expected)


@given(st.lists(RUNNING, max_size=5), st.lists(PROMISED, min_size=1, max_size=5), st.integers(500, 20_000),
       st.integers(1, 40), st.booleans(), st.sampled_from([TIMES, replace(TIMES, a=1e-5)]))  # fmt: skip
def test_fit_equals_the_conditions_of_each_request(
    old: list[Request],
    requests: list[Request],
    kv_tokens: int,
    slots: int,
    preemptible: bool,
    times: StepTimes,
) -> None:
    state = engine(kv_tokens=kv_tokens, max_num_seqs=slots, gate=GateReport(preemptible=preemptible))
    state.step_time = StepTimeModel(times=times, learn=False)
    batch = RunningBatch(old, state, now=NOW)
    queue = waiting_batch(requests)
    fits = queue.fit(batch, NOW, np.arange(len(requests)))
    in_full_steps, full_token_s = batch.full_steps
    for at, request in enumerate(requests):
        both = RunningBatch(old, state)
        both.add((request,), float(queue.pace_s[at]))
        step_s, strictest_s, token_s = both.step_s, both.strictest_s, both.prefill_token_s
        chunk_s = max(min(strictest_s - step_s, token_s * state.max_num_batched_tokens), 1e-12)
        tokens = batch.backlog + request.prompt_tokens
        full = min(tokens, in_full_steps)
        steps = 2 + token_s * (tokens - full) / chunk_s
        left_s = token_s * (2 * batch.backlog + sum(other.prompt_tokens for other in requests))
        first_s = full * full_token_s + steps * step_s + min(steps * chunk_s, left_s)
        memory = both.memory - both.preemptible_memory
        ratios = (
            step_s / max(strictest_s, 1e-12),
            first_s / max(request.deadline_s - NOW, 1e-9),
            memory / kv_tokens,
        )
        if all(abs(ratio - 1) > 1e-6 for ratio in ratios):
            assert fits[at] == (both.free_slots >= 0 and all(ratio < 1 for ratio in ratios))


def test_fit_counts_a_request_by_its_mean_context() -> None:
    # A step of two takes 10.2 ms, and 0.1 ms or more for 1000 tokens of context.
    batch = RunningBatch([running(tpot=0.011)], engine())
    queue = waiting_batch([make_request(tpot=1.0, prompt=1, output=output) for output in (100, 20_000)])
    assert queue.fit(batch, NOW, np.arange(2)).tolist() == [True, False]


def test_fit_expects_full_steps_before_the_first_token() -> None:
    # Beside 20 decodes and its own, a step of the strictest pace, 0.1 s, has 0.0875 s for prefill.
    batch = RunningBatch([running(str(i), tpot=0.1, output=1000) for i in range(20)], engine())

    def fits(ttft: float) -> bool:
        return bool(waiting_batch([make_request(ttft=ttft, tpot=1.0)]).fit(batch, NOW, np.array([0]))[0])

    # Decodes take 12.5 ms in each step: the one under way, the last one, and 1.14 or 1.71 others. Prefill takes 0.1 s
    # for the prompt, and 0.05 s for the backlog, of which as much may be in the step under way.
    for backlog, first_s in ((0, 3.143 * 0.0125 + 0.1), (50, 3.714 * 0.0125 + 0.2)):
        batch.backlog = backlog
        assert fits(first_s + 0.002)
        assert not fits(first_s - 0.002)


@given(st.lists(PROMISED, min_size=1, max_size=6), st.lists(RUNNING, max_size=4))
def test_cost_equals_that_of_each_request(requests: list[Request], old: list[Request]) -> None:
    batch = RunningBatch(old, engine())
    queue, curve, token_s = waiting_batch(requests), batch.engine.step_time.curve, batch.prefill_token_s
    for at, request in enumerate(requests):
        mean_length = request.prompt_tokens + request.predicted_tokens / 2
        decode_s = token_s + max(-curve.e, 0.0) + curve.a * mean_length
        output = request.sequences * request.predicted_tokens
        assert queue.cost_s(batch)[at] == pytest.approx(token_s * request.prompt_tokens + decode_s * output)


def test_cost_grows_with_prompt_output_and_sequences() -> None:
    requests = [make_request(tpot=1.0, **more) for more in ({}, {"prompt": 101}, {"output": 51}, {"sequences": 2})]
    base, *higher = waiting_batch(requests).cost_s(RunningBatch([], engine()))
    assert all(cost > base for cost in higher)


@given(st.lists(PROMISED, min_size=1, max_size=6), st.data())
def test_only_equals_the_batch_of_the_selected_requests(requests: list[Request], data: st.DataObject) -> None:
    which = np.array(data.draw(st.lists(st.booleans(), min_size=len(requests), max_size=len(requests))))
    selected = [request for request, keep in zip(requests, which, strict=True) if keep]
    part, expected = waiting_batch(requests).only(which), waiting_batch(selected)
    assert list(part.requests) == selected
    assert np.array_equal(part.pace_s, expected.pace_s)
    assert all(np.array_equal(a, b) for a, b in zip(part.arrays, expected.arrays, strict=True))


@given(RUNNING, st.lists(RUNNING, max_size=5), st.integers(0, 20_000), st.integers(1, 30))
def test_has_room_for_never_counts_preemptible_slots_or_memory(
    one: Request, old: list[Request], kv_tokens: int, slots: int
) -> None:
    one.generated = 0
    state: EngineState = engine(kv_tokens=kv_tokens, max_num_seqs=slots, gate=GateReport(preemptible=True))
    both = RunningBatch([*old, one], state)
    if abs(both.memory - kv_tokens) > 1e-6:
        expected = both.slots <= slots and (not kv_tokens or both.memory <= kv_tokens)
        assert RunningBatch(old, state).has_room_for(one) == expected


def test_cost_counts_fewer_decodes_with_accepted_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    """With two tokens a step, a request costs what one of half the output and the same mean context costs."""
    short, long = make_request(prompt=1000, output=50), make_request(prompt=975, output=100)
    short.cached_tokens = 25
    plain, drafting = engine(), engine()
    for _ in range(300):
        drafting.acceptance.observe(StepReport(4, 0, 100.0, 0.01, 4, 12, 4, offered_requests=4))
    old = [running(tpot=0.05)]
    one_token, two_tokens = RunningBatch(old, plain), RunningBatch(old, drafting)
    assert drafting.tokens_per_step == pytest.approx(2)
    monkeypatch.setattr(RunningBatch, "prefill_token_s", one_token.prefill_token_s)
    [fast], [slow] = waiting_batch([long]).cost_s(two_tokens), waiting_batch([short]).cost_s(one_token)
    assert fast == pytest.approx(slow)
    assert fast < waiting_batch([long]).cost_s(one_token)[0]
