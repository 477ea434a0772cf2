"""The bounds: no schedule passes them, whatever it knows; and they are not idle."""

from __future__ import annotations

import math
import random
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine_adapter.step_time.profile import Profile, Regime, load_profile, profile_names
from lab.bounds import Work, _Jobs, _most, bounds, works
from lab.workload import WorkloadRequest, make_workload

pytestmark = (
    pytest.mark.no_cover
)  # whole simulations, four times slower under a tracer; the rooms have tests of their own

A100 = load_profile("blis-a100")


def profile(*regimes: Regime, seqs: int = 8, tokens: int = 64) -> Profile:
    return Profile("test", "", {}, regimes, seqs, tokens, 512, 10_000)


@pytest.mark.parametrize("name", profile_names())
def test_no_step_costs_less_than_its_tokens(name: str) -> None:
    """Condition (1) of the module, at random steps and at the corners."""
    shipped = load_profile(name)
    costs = works(shipped)
    assert len(costs) > 1
    drawn = random.Random(0)
    for _ in range(3000):
        decodes = drawn.choice([0, 1, shipped.max_num_seqs, drawn.randint(0, shipped.max_num_seqs)])
        room = shipped.max_num_batched_tokens - decodes
        prefill = drawn.choice([0, 1, room, drawn.randint(0, room), drawn.randint(0, min(room, 600))])
        if decodes + prefill == 0:
            continue
        context = decodes * drawn.choice([1, 500, 1000])
        seconds = shipped.step_seconds(decodes, context, prefill, drawn.choice([0, prefill]))
        for work in costs:
            least = work.per_prompt_token_s * prefill + work.per_decode_s * decodes
            assert least + work.per_context_token_s * context <= seconds * (1 + 1e-9)
            assert work.shortest_step_s <= seconds * (1 + 1e-9)


@given(
    st.lists(st.tuples(st.floats(0.1, 5), st.floats(0.1, 5)), min_size=1, max_size=9),
)
def test_the_fill_is_the_best_of_all_subsets(jobs: list[tuple[float, float]]) -> None:
    jobs = sorted(jobs, key=lambda job: job[1])
    work, deadline = np.array(jobs).T

    def fits(chosen: tuple[int, ...]) -> bool:
        return bool((np.cumsum(work[list(chosen)]) <= deadline[list(chosen)]).all())

    best = max(n for n in range(len(jobs) + 1) if any(fits(chosen) for chosen in combinations(range(len(jobs)), n)))
    assert _most(_Jobs(np.zeros(len(jobs)), deadline, work)) == best


class Schedule:
    """A scheduler that knows everything and serves only whom it chose, in chunks and batches drawn at random."""

    def __init__(self, engine: Profile, workload: list[WorkloadRequest], drawn: random.Random) -> None:
        self.engine, self.workload, self.drawn = engine, workload, drawn
        self.left = {i: asked.prompt_tokens for i, asked in enumerate(workload)}
        self.made = dict.fromkeys(self.left, 0)
        self.first: dict[int, float] = {}
        self.attained = 0

    def run(self, chosen: list[int]) -> int:
        now, order = 0.0, self.drawn.choice(["deadline", "shortest"])
        todo = set(chosen)
        while todo:
            here = [i for i in todo if self.workload[i].at_s <= now]
            if not here:
                now = min(self.workload[i].at_s for i in todo)
                continue
            here.sort(key=lambda i: self._rank(i, order))
            decodes = [i for i in here if not self.left[i]][: self.engine.max_num_seqs]
            room = self.engine.max_num_batched_tokens - len(decodes)
            chunks = {}
            for i in here:
                if self.left[i] and room > 0 and len(decodes) + len(chunks) < self.engine.max_num_seqs:
                    chunks[i] = min(self.left[i], room if self.drawn.random() < 0.8 else self.drawn.randint(1, room))
                    room -= chunks[i]
            context = sum(self.workload[i].prompt_tokens + self.made[i] for i in decodes)
            now += self.engine.step_seconds(len(decodes), context, sum(chunks.values()), 0, max(len(chunks), 1))
            for i, chunk in chunks.items():
                self.left[i] -= chunk
            for i in [*decodes, *(i for i in chunks if not self.left[i])]:
                self.made[i] += 1
                self.first.setdefault(i, now)
                if self.made[i] == self.workload[i].output_tokens:
                    todo.discard(i)
                    self.attained += self._attains(i, now)
            if self.drawn.random() < 0.5:  # drop whom it can no longer save
                todo -= {i for i in here if now > self._deadline(i)}
        return self.attained

    def _deadline(self, i: int) -> float:
        asked = self.workload[i]
        return asked.at_s + asked.ttft_slo_s + (asked.output_tokens - 1) * asked.tpot_slo_s

    def _rank(self, i: int, order: str) -> float:
        return self._deadline(i) if order == "deadline" else self.workload[i].output_tokens

    def _attains(self, i: int, now: float) -> bool:
        asked = self.workload[i]
        tpot = (now - self.first[i]) / max(asked.output_tokens - 1, 1)
        return self.first[i] - asked.at_s <= asked.ttft_slo_s and tpot <= asked.tpot_slo_s


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
def test_no_schedule_attains_more_than_the_count_bound(
    base: float, prefill: float, decode: float, context: float, cheaper: float, kept: float, seed: int
) -> None:
    drawn = random.Random(seed)
    engine = profile(
        Regime(16, base, 0.0, prefill, decode, context, 0.0),
        # Above 16 tokens everything may be cheaper, down to a decode that pays for itself.
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
    workload.sort(key=lambda asked: asked.at_s)
    count, fair = bounds(workload, works(engine))
    assert 0 <= fair <= count <= 1
    by_size = sorted(range(60), key=lambda i: workload[i].prompt_tokens + workload[i].output_tokens)
    for share in (kept, count, 1.0):
        chosen = by_size[: max(1, round(share * 60))]
        assert Schedule(engine, workload, drawn).run(chosen) <= round(count * 60)


@pytest.mark.parametrize("policy", ["fcfs", "scorpio"])
def test_no_policy_in_the_simulator_attains_more_than_the_count_bound(policy: str) -> None:
    from lab.simulate.experiment import Experiment, Run, perform

    experiment = Experiment(profile="niyama-a100", workload={"name": "sharegpt", "duration_s": 8.0}, predictor="oracle")
    for qps in (10.0, 60.0):
        record = perform(experiment, Run(policy, qps, 0))
        assert record["slo_adherence"] <= record["count_bound"] <= 1


def test_light_load_is_not_bounded_and_heavy_load_is() -> None:
    costs = works(A100)
    light, heavy, heavier = (bounds(make_workload("sharegpt", qps=qps, duration_s=60), costs) for qps in (5, 60, 120))
    assert light == (1.0, 1.0)
    assert 1 > heavy[0] > heavier[0] > 0.3
    assert heavy[1] < heavy[0]
    assert heavier[1] < heavy[1]


def test_the_deadlines_tighten_what_the_total_time_allows() -> None:
    workload = make_workload("sharegpt", qps=90, duration_s=60)
    work = works(A100)[6]
    total_time = max(a.at_s + a.ttft_slo_s + a.output_tokens * a.tpot_slo_s for a in workload)
    each = sorted(
        work.per_prompt_token_s * a.prompt_tokens + work.per_decode_s * (a.output_tokens - 1) for a in workload
    )
    plain = np.searchsorted(np.cumsum(each), total_time) / len(workload)
    assert bounds(workload, work)[0] < plain - 0.02


def test_a_burst_inside_a_quiet_trace_is_seen() -> None:
    quiet = [WorkloadRequest(float(t), 100, 50, 0.5, 0.03, 1) for t in range(2000)]
    burst = [WorkloadRequest(1000.5 + i * 1e-4, 100, 50, 0.5, 0.03, 1) for i in range(4000)]
    workload = sorted(quiet + burst, key=lambda asked: asked.at_s)
    count, fair = bounds(workload, works(A100))
    # All the work fits into all the time; the burst's does not fit into 2 s.
    assert count < 0.6
    assert fair < 0.6


def test_who_cannot_attain_on_an_idle_engine_is_not_counted() -> None:
    fast = WorkloadRequest(0.0, 100, 50, 0.5, A100.regimes[0].base / 2, 1)
    possible = WorkloadRequest(0.0, 100, 50, 0.5, 0.05, 1)
    assert bounds([fast, possible], works(A100)) == (0.5, 0.5)
    infeasible = WorkloadRequest(0.0, 100_000, 1, 0.5, 0.05, 1)
    assert bounds([infeasible], works(A100)) == (0.0, 0.0)


def test_two_engines_can_do_more() -> None:
    workload = make_workload("sharegpt", qps=100, duration_s=60)
    one, two = (bounds(workload, works(A100), engines) for engines in (1, 2))
    assert one[0] < two[0]
    assert one[1] < two[1]


def test_smaller_limits_make_steps_dearer() -> None:
    workload = make_workload("sharegpt", qps=60, duration_s=60)
    assert bounds(workload, works(A100, max_num_seqs=32))[0] < bounds(workload, works(A100))[0]


def test_a_single_cost_will_do_and_nothing_will_not() -> None:
    workload = make_workload("small", qps=1, requests=3)
    assert bounds(workload, Work(1e-5, 1e-5)) == (1.0, 1.0)
    for workload_, costs in (([], [Work(1e-5, 1e-5)]), (workload, [])):
        with pytest.raises(ValueError, match="at least one"):
            bounds(workload_, costs)
