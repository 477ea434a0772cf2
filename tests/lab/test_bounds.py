"""Bounds on adherence: no schedule exceeds them, and they are tight enough to be useful."""

from __future__ import annotations

import math
import random
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine_adapter.step_time.profile import Profile, Regime, load_profile, profile_names
from lab.bounds import TokenCosts, bounds, token_costs, uncached_tokens
from lab.workload import WorkloadRequest, make_workload

# Whole simulations are four times slower under a coverage tracer; unit tests cover the same code.
pytestmark = pytest.mark.no_cover

A100 = load_profile("blis-a100")


def profile(*regimes: Regime, seqs: int = 8, tokens: int = 64) -> Profile:
    return Profile("test", "", {}, regimes, seqs, tokens, 512, 10_000)


@pytest.mark.parametrize("name", profile_names())
def test_token_costs_never_exceed_step_time(name: str) -> None:
    """Condition (1) of `lab.bounds`, at random steps and at the limits."""
    shipped = load_profile(name)
    costs = token_costs(shipped)
    assert len(costs) > 1
    drawn = random.Random(0)
    for _ in range(3000):
        decodes = drawn.choice([0, 1, shipped.max_num_seqs, drawn.randint(0, shipped.max_num_seqs)])
        budget = shipped.max_num_batched_tokens - decodes
        prefill = drawn.choice([0, 1, budget, drawn.randint(0, budget), drawn.randint(0, min(budget, 600))])
        if decodes + prefill == 0:
            continue
        context = decodes * drawn.choice([1, 500, 1000])
        seconds = shipped.step_seconds(decodes, context, prefill, drawn.choice([0, prefill]))
        for cost in costs:
            without_context = cost.per_prompt_token_s * prefill + cost.per_decode_s * decodes
            assert without_context + cost.per_context_token_s * context <= seconds * (1 + 1e-9)
            assert cost.shortest_step_s <= seconds * (1 + 1e-9)


@given(st.lists(st.tuples(st.integers(100, 5000), st.integers(100, 5000)), min_size=1, max_size=9))
def test_count_bound_is_best_subset(jobs: list[tuple[int, int]]) -> None:
    """Against brute force, for jobs of (work, deadline) in ms that all arrive at 0."""
    jobs = sorted(jobs, key=lambda job: job[1])
    work, deadline = np.array(jobs).T

    def fits(chosen: tuple[int, ...]) -> bool:
        return bool((np.cumsum(work[list(chosen)]) <= deadline[list(chosen)]).all())

    best = max(n for n in range(len(jobs) + 1) if any(fits(chosen) for chosen in combinations(range(len(jobs)), n)))
    # A millisecond per prompt token and one output token, so that work and deadline are those of the jobs.
    workload = [WorkloadRequest(0.0, prompt_ms, 1, ttft_ms / 1000, 1.0, 1) for prompt_ms, ttft_ms in jobs]
    assert round(bounds(workload, TokenCosts(1e-3, 0.0))[0] * len(jobs)) == best


def test_responses_without_decodes_fit_where_only_decodes_cost() -> None:
    workload = [WorkloadRequest(0.0, 100, 1, 1e6, 1.0, 1)] * 3
    assert bounds(workload, TokenCosts(0.0, 1e-3)) == (1.0, 1.0)


class ClairvoyantSchedule:
    """A schedule that knows true lengths and serves only chosen requests, in random chunks and batches."""

    def __init__(self, engine: Profile, workload: list[WorkloadRequest], drawn: random.Random) -> None:
        self.engine, self.workload, self.drawn = engine, workload, drawn
        self.left = {i: request.prompt_tokens for i, request in enumerate(workload)}
        self.generated = dict.fromkeys(self.left, 0)
        self.first: dict[int, float] = {}
        self.attained = 0

    def run(self, chosen: list[int]) -> int:
        now, order = 0.0, self.drawn.choice(["deadline", "shortest"])
        todo = set(chosen)
        while todo:
            arrived = [i for i in todo if self.workload[i].at_s <= now]
            if not arrived:
                now = min(self.workload[i].at_s for i in todo)
                continue
            arrived.sort(key=lambda i: self._rank(i, order))
            decodes = [i for i in arrived if not self.left[i]][: self.engine.max_num_seqs]
            budget = self.engine.max_num_batched_tokens - len(decodes)
            chunks = {}
            for i in arrived:
                if self.left[i] and budget > 0 and len(decodes) + len(chunks) < self.engine.max_num_seqs:
                    chunks[i] = min(
                        self.left[i], budget if self.drawn.random() < 0.8 else self.drawn.randint(1, budget)
                    )
                    budget -= chunks[i]
            context = sum(self.workload[i].prompt_tokens + self.generated[i] for i in decodes)
            now += self.engine.step_seconds(len(decodes), context, sum(chunks.values()), 0, max(len(chunks), 1))
            for i, chunk in chunks.items():
                self.left[i] -= chunk
            for i in [*decodes, *(i for i in chunks if not self.left[i])]:
                self.generated[i] += 1
                self.first.setdefault(i, now)
                if self.generated[i] == self.workload[i].output_tokens:
                    todo.discard(i)
                    self.attained += self._attains(i, now)
            if self.drawn.random() < 0.5:  # drop requests that have missed their deadline
                todo -= {i for i in arrived if now > self._deadline(i)}
        return self.attained

    def _deadline(self, i: int) -> float:
        request = self.workload[i]
        return request.at_s + request.ttft_slo_s + (request.output_tokens - 1) * request.tpot_slo_s

    def _rank(self, i: int, order: str) -> float:
        return self._deadline(i) if order == "deadline" else self.workload[i].output_tokens

    def _attains(self, i: int, now: float) -> bool:
        request = self.workload[i]
        tpot = (now - self.first[i]) / max(request.output_tokens - 1, 1)
        return self.first[i] - request.at_s <= request.ttft_slo_s and tpot <= request.tpot_slo_s


cost = st.floats(1e-5, 2e-3)


@settings(max_examples=60)
@given(
    base=st.floats(1e-3, 0.02),
    prefill=cost,
    decode=cost,
    context=st.floats(0, 1e-5),
    cheaper=st.floats(-1e-3, 0),
    kept=st.floats(0.1, 1.0),
    seed=st.integers(0, 10_000),
)
def test_count_bound_holds_for_clairvoyant_schedules(
    base: float, prefill: float, decode: float, context: float, cheaper: float, kept: float, seed: int
) -> None:
    drawn = random.Random(seed)
    engine = profile(
        Regime(16, base, 0.0, prefill, decode, context, 0.0),
        # Above 16 tokens, every coefficient may be smaller; that of decodes may be negative.
        Regime(math.inf, base * 1.5, 0.0, prefill * drawn.random(), decode + cheaper, context * drawn.random(), 0.0),
    )
    workload = [
        WorkloadRequest(
            drawn.uniform(0, 1),
            drawn.randint(1, 60),
            drawn.randint(1, 20),
            drawn.choice([0.1, 0.5, 2.0]),
            drawn.choice([0.01, 0.03]),
            1,
        )
        for _ in range(60)
    ]
    workload.sort(key=lambda request: request.at_s)
    count, fair = bounds(workload, token_costs(engine))
    assert 0 <= fair <= count <= 1
    by_size = sorted(range(60), key=lambda i: workload[i].prompt_tokens + workload[i].output_tokens)
    for share in (kept, count, 1.0):
        chosen = by_size[: max(1, round(share * 60))]
        assert ClairvoyantSchedule(engine, workload, drawn).run(chosen) <= round(count * 60)


@pytest.mark.parametrize("policy", ["fcfs", "scorpio"])
def test_count_bound_holds_for_simulated_policies(policy: str) -> None:
    from lab.simulate.experiment import Experiment, Run, perform

    experiment = Experiment(profile="niyama-a100", workload={"name": "sharegpt", "duration_s": 4.0}, predictor="oracle")
    for qps in (10.0, 60.0):
        record = perform(experiment, Run(policy, qps, 0))
        assert record["slo_adherence"] <= record["count_bound"] <= 1


def test_bounds_are_one_under_light_load_and_fall_with_load() -> None:
    costs = token_costs(A100)
    light, heavy, heavier = (bounds(make_workload("sharegpt", qps=qps, duration_s=60), costs) for qps in (5, 60, 120))
    assert light == (1.0, 1.0)
    assert 1 > heavy[0] > heavier[0] > 0.3
    assert heavy[1] < heavy[0]
    assert heavier[1] < heavy[1]


def test_deadlines_tighten_the_bound_of_total_time() -> None:
    workload = make_workload("sharegpt", qps=90, duration_s=60)
    cost = token_costs(A100)[6]
    total_time = max(a.at_s + a.ttft_slo_s + a.output_tokens * a.tpot_slo_s for a in workload)
    work = sorted(
        cost.per_prompt_token_s * a.prompt_tokens + cost.per_decode_s * (a.output_tokens - 1) for a in workload
    )
    by_total_time = np.searchsorted(np.cumsum(work), total_time) / len(workload)
    assert bounds(workload, cost)[0] < by_total_time - 0.02


def test_bounds_detect_burst_in_quiet_trace() -> None:
    quiet = [WorkloadRequest(float(t), 100, 50, 0.5, 0.03, 1) for t in range(2000)]
    burst = [WorkloadRequest(1000.5 + i * 1e-4, 100, 50, 0.5, 0.03, 1) for i in range(4000)]
    workload = sorted(quiet + burst, key=lambda request: request.at_s)
    count, fair = bounds(workload, token_costs(A100))
    # All the work fits in the whole time; the work of the burst does not fit in 2 s.
    assert count < 0.6
    assert fair < 0.6


def test_bounds_exclude_infeasible_requests() -> None:
    fast = WorkloadRequest(0.0, 100, 50, 0.5, A100.regimes[0].base / 2, 1)
    possible = WorkloadRequest(0.0, 100, 50, 0.5, 0.05, 1)
    assert bounds([fast, possible], token_costs(A100)) == (0.5, 0.5)
    infeasible = WorkloadRequest(0.0, 100_000, 1, 0.5, 0.05, 1)
    assert bounds([infeasible], token_costs(A100)) == (0.0, 0.0)


def test_bounds_rise_with_engines() -> None:
    workload = make_workload("sharegpt", qps=100, duration_s=60)
    one, two = (bounds(workload, token_costs(A100), engines) for engines in (1, 2))
    assert one[0] < two[0]
    assert one[1] < two[1]


def test_bounds_fall_with_smaller_batch_limit() -> None:
    workload = make_workload("sharegpt", qps=60, duration_s=60)
    assert bounds(workload, token_costs(A100, max_num_seqs=32))[0] < bounds(workload, token_costs(A100))[0]


def test_bounds_need_requests_and_costs() -> None:
    workload = make_workload("small", qps=1, requests=3)
    assert bounds(workload, TokenCosts(1e-5, 1e-5)) == (1.0, 1.0)
    for workload_, costs in (([], [TokenCosts(1e-5, 1e-5)]), (workload, [])):
        with pytest.raises(ValueError, match="at least one"):
            bounds(workload_, costs)


# --- prefix caching ---------------------------------------------------------------------------------------------------


def prefixed(at: float, prompt: int, *blocks: int, ttft: float = 1.0) -> WorkloadRequest:
    return WorkloadRequest(at, prompt, 1, ttft, 1.0, 1, blocks=blocks)


def test_uncached_tokens_are_those_that_no_earlier_request_has() -> None:
    workload = [
        prefixed(0.0, 40, 1, 2, 3),
        prefixed(0.5, 60, 1, 2, 30, 40),  # arrives before the first token of the first is due
        prefixed(9.0, 64, 1, 2, 3, 4, 5),  # its last token is computed at least
        prefixed(9.0, 20, 7, 8),
    ]
    assert uncached_tokens(workload) == [40 - 32, 60 - 32, 64 - 48, 20]


def test_request_that_arrives_too_late_provides_nothing() -> None:
    workload = [prefixed(0.0, 40, 1, 2, 3, ttft=0.4), prefixed(0.5, 40, 1, 2, 3)]
    assert uncached_tokens(workload) == [40, 8]


@given(
    st.lists(
        st.tuples(st.floats(0, 3), st.integers(0, 3), st.integers(1, 5), st.integers(0, 15), st.floats(0.1, 2)),
        min_size=1,
        max_size=12,
    )
)
def test_uncached_tokens_match_a_search_of_all_pairs(drawn: list[tuple[float, int, int, int, float]]) -> None:
    """Requests of four conversations that all begin with the same two blocks."""
    workload = [
        prefixed(at, 16 * full + tail + 1, *((b if b < 2 else 100 * c + b) for b in range(full + 1)), ttft=ttft)
        for at, c, full, tail, ttft in drawn
    ]

    def expected(request: WorkloadRequest) -> int:
        others = [o for o in workload if o is not request and o.at_s <= request.at_s + request.ttft_slo_s]
        longest = 0
        for other in others:
            shared = 0
            for mine, theirs in zip(request.blocks, other.blocks, strict=False):
                if mine != theirs:
                    break
                shared += 1
            longest = max(longest, shared)
        return request.prompt_tokens - 16 * min(longest, (request.prompt_tokens - 1) // 16)

    assert uncached_tokens(workload) == [expected(request) for request in workload]
