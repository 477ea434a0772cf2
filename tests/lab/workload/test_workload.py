"""Workloads: the same from one seed, comparable across rates, and true to the data they are made from."""

from __future__ import annotations

import time

import numpy as np
import pytest

from lab.workload import SLO_TABLES, WorkloadRequest, make_workload, slo_table_names, workload_names
from lab.workload.lengths import DATA, rows


def gaps(workload: list[WorkloadRequest]) -> np.ndarray:
    return np.diff([asked.at_s for asked in workload], prepend=0.0)


def sizes(workload: list[WorkloadRequest]) -> list[tuple[int, int]]:
    return [(asked.prompt_tokens, asked.output_tokens) for asked in workload]


@pytest.mark.parametrize("name", workload_names())
def test_one_seed_gives_one_workload_and_another_seed_another(name: str) -> None:
    made = make_workload(name, qps=10, requests=50, seed=3)
    assert made == make_workload(name, qps=10, requests=50, seed=3)
    assert made != make_workload(name, qps=10, requests=50, seed=4)
    assert len(made) == 50
    assert all(asked.prompt_tokens >= 1 and asked.output_tokens >= 1 for asked in made)


@pytest.mark.parametrize("arrivals", [{"arrivals": "poisson"}, {"arrivals": "gamma", "burstiness": 3.0}])
def test_a_higher_rate_only_moves_the_same_requests_closer_together(arrivals: dict) -> None:
    slow = make_workload("sharegpt", qps=5, requests=200, **arrivals)
    fast = make_workload("sharegpt", qps=20, requests=200, **arrivals)
    assert sizes(slow) == sizes(fast)
    assert [asked.category for asked in slow] == [asked.category for asked in fast]
    assert np.allclose(gaps(slow), 4 * gaps(fast))


@pytest.mark.parametrize("name", workload_names())
def test_a_longer_run_begins_with_the_shorter_one(name: str) -> None:
    short = make_workload(name, qps=20, duration_s=5)
    long = make_workload(name, qps=20, duration_s=50)
    assert len(short) < len(long)
    assert long[: len(short)] == short


def test_what_ends_first_ends_the_workload() -> None:
    assert len(make_workload("small", qps=100, requests=20, duration_s=60)) == 20
    by_time = make_workload("small", qps=100, requests=10_000, duration_s=2)
    assert 100 < len(by_time) < 300
    assert by_time[-1].at_s < 2


def test_bounds_and_categories_leave_arrivals_and_lengths_alone() -> None:
    plain = make_workload("small", qps=10, requests=50)
    other = make_workload("small", qps=10, requests=50, slo_table="gemma-2-27b", slo_scale=2, mix={6: 1})
    assert [(a.at_s, a.prompt_tokens, a.output_tokens) for a in plain] == [
        (a.at_s, a.prompt_tokens, a.output_tokens) for a in other
    ]
    assert {(a.category, a.ttft_slo_s, a.tpot_slo_s) for a in other} == {(6, 30.0, 0.2)}


def test_poisson_arrivals_have_the_rate_asked_for_and_a_variation_of_one() -> None:
    between = gaps(make_workload("small", qps=8, requests=20_000))
    assert between.mean() == pytest.approx(1 / 8, rel=0.03)
    assert between.std() / between.mean() == pytest.approx(1.0, rel=0.03)


@pytest.mark.parametrize("burstiness", [0.5, 2.0, 4.0])
def test_gamma_arrivals_have_the_rate_and_the_variation_asked_for(burstiness: float) -> None:
    between = gaps(make_workload("small", qps=8, requests=40_000, arrivals="gamma", burstiness=burstiness))
    assert between.mean() == pytest.approx(1 / 8, rel=0.06)
    assert between.std() / between.mean() == pytest.approx(burstiness, rel=0.06)


def test_a_trace_is_replayed_with_its_own_times_and_lengths() -> None:
    made = make_workload("azure-conv", arrivals="trace", window_s=1200)
    assert len(made) == 5985
    # The file's first rows: 18:15:46.68059 374 44, 18:15:50.995169 396 109, 18:15:51.222467 879 55.
    assert [(a.at_s, a.prompt_tokens, a.output_tokens) for a in made[:3]] == [
        (0.0, 374, 44),
        (pytest.approx(4.314579), 396, 109),
        (pytest.approx(4.541877), 879, 55),
    ]
    assert made[-1].at_s < 1200
    code = gaps(make_workload("azure-code", arrivals="trace"))[1:]
    assert len(code) == 8818
    assert code.std() / code.mean() == pytest.approx(13.2, abs=0.1)


def test_a_trace_lends_its_times_to_other_lengths() -> None:
    trace = make_workload("azure-conv", arrivals="trace", window_s=300)
    lent = make_workload("sharegpt", arrivals="trace", window_s=300)
    assert [a.at_s for a in lent] == [a.at_s for a in trace]
    assert sizes(lent) == sizes(make_workload("sharegpt", qps=1, requests=len(lent)))
    assert sizes(lent) != sizes(trace)


def test_a_trace_can_be_sped_up_by_a_factor_or_to_a_rate() -> None:
    trace = make_workload("azure-conv", arrivals="trace", window_s=300)
    fast = make_workload("azure-conv", arrivals="trace", window_s=300, speed=3)
    assert [a.at_s * 3 for a in fast] == pytest.approx([a.at_s for a in trace])
    at_rate = make_workload("azure-conv", arrivals="trace", window_s=300, qps=20)
    assert len(at_rate) == len(trace)
    assert len(at_rate) / (300 * at_rate[-1].at_s / trace[-1].at_s) == pytest.approx(20)


def test_sharegpt_leaves_out_what_is_longer_and_traces_cut_it() -> None:
    sharegpt = make_workload("sharegpt", qps=1, requests=5000)
    assert max(a.prompt_tokens for a in sharegpt) <= 1024
    assert min(min(a.prompt_tokens, a.output_tokens) for a in sharegpt) >= 4
    short = make_workload("sharegpt", qps=1, requests=5000, max_prompt=100, max_output=200)
    assert max(a.prompt_tokens for a in short) <= 100
    assert sum(a.output_tokens == 200 for a in short) < 100, "piled up at the limit"
    trace = make_workload("azure-code", arrivals="trace", max_prompt=1000)
    assert len(trace) == 8819
    assert max(a.prompt_tokens for a in trace) == 1000


def test_categories_are_even_unless_a_mix_is_given() -> None:
    even = np.bincount([a.category for a in make_workload("small", qps=1, requests=12_000)], minlength=7)
    assert even[0] == 0
    assert (abs(even[1:] - 2000) < 200).all()
    mixed = np.bincount(
        [a.category for a in make_workload("small", qps=1, requests=12_000, mix={1: 3, 4: 1})], minlength=7
    )
    assert mixed[1] == pytest.approx(9000, abs=200)
    assert mixed[1] + mixed[4] == 12_000


def test_each_category_has_the_bounds_of_its_row() -> None:
    for table in slo_table_names():
        for asked in make_workload("small", qps=1, requests=60, slo_table=table, slo_scale=2):
            ttft_s, tpot_ms, e2e_s = SLO_TABLES[table][asked.category - 1]
            assert (asked.ttft_slo_s, asked.e2e_slo_s) == (2 * ttft_s, 2 * e2e_s)
            assert asked.tpot_slo_s == pytest.approx(2 * tpot_ms / 1000)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"name": "nope"}, "sharegpt, lmsys-like, azure-conv, azure-code, code-chat, small"),
        ({"arrivals": "nope"}, "poisson, gamma, trace"),
        ({"trace": "nope", "arrivals": "trace"}, "azure-conv, azure-code"),
        ({"slo_table": "nope"}, "llama-3.1-8b, gemma-2-27b"),
        ({"qps": None}, "need qps"),
        ({"requests": None}, "requests or duration_s"),
        ({"qps": 0.0}, "qps must be a positive number"),
        ({"qps": float("nan")}, "qps must be a positive number"),
        ({"seed": -1}, "seed"),
        ({"burstiness": 2.0}, "gamma"),
        ({"speed": 2.0}, "trace"),
        ({"arrivals": "trace", "speed": 2.0}, "not both"),
        ({"mix": {7: 1}}, "1 to 6"),
        ({"mix": {1: 0}}, "not all zero"),
        ({"max_prompt": 0}, "max_prompt"),
        ({"max_prompt": 1}, "sharegpt has no request"),
    ],
)
def test_what_cannot_be_made_is_refused_with_what_exists(wrong: dict, said: str) -> None:
    right = {"name": "sharegpt", "qps": 1.0, "requests": 1}
    with pytest.raises(ValueError, match=said):
        make_workload(**{**right, **wrong})


def test_a_hundred_thousand_requests_take_well_under_a_second() -> None:
    rows("sharegpt")
    started = time.perf_counter()
    assert len(make_workload("sharegpt", qps=50, requests=100_000)) == 100_000
    # 0.2 s on an idle core; the machine may be busy.
    assert time.perf_counter() - started < 1.5


def test_the_data_files_are_small_and_hold_nothing_but_counts_and_times() -> None:
    for file in (DATA / f"{name}.npz" for name in ("sharegpt", "azure-conv", "azure-code")):
        assert file.stat().st_size < 300_000
        with np.load(file, allow_pickle=False) as arrays:
            assert all(np.issubdtype(arrays[name].dtype, np.unsignedinteger) for name in arrays.files)


def test_sharegpt_has_the_pile_up_at_the_old_output_limit_that_its_readme_tells_of() -> None:
    outputs = rows("sharegpt").output_tokens
    assert len(outputs) == 9385
    at_limit = ((outputs >= 767) & (outputs <= 772)).mean()
    assert f"{at_limit:.1%} of them have 767 to 772 tokens" in (DATA / "README.md").read_text()


def test_lmsys_like_has_about_the_means_that_lmsys_states() -> None:
    prompts, outputs = np.array(sizes(make_workload("lmsys-like", qps=1, requests=40_000))).mean(axis=0)
    assert 0.9 * 69.5 < prompts < 69.5 * 1.05
    assert 0.9 * 214.5 < outputs < 214.5 * 1.05
