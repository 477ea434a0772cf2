"""Workloads: reproducible by seed, comparable across rates, and faithful to their data."""

from __future__ import annotations

import time

import numpy as np
import pytest

from lab.workload import SLO_TABLES, WorkloadRequest, make_workload, slo_table_names, workload_names
from lab.workload.lengths import DATA, dataset


def gaps(workload: list[WorkloadRequest]) -> np.ndarray:
    return np.diff([request.at_s for request in workload], prepend=0.0)


def sizes(workload: list[WorkloadRequest]) -> list[tuple[int, int]]:
    return [(request.prompt_tokens, request.output_tokens) for request in workload]


@pytest.mark.parametrize("name", workload_names())
def test_workload_is_reproducible_by_seed(name: str) -> None:
    made = make_workload(name, qps=10, requests=50, seed=3)
    assert made == make_workload(name, qps=10, requests=50, seed=3)
    assert made != make_workload(name, qps=10, requests=50, seed=4)
    assert len(made) == 50
    assert all(request.prompt_tokens >= 1 and request.output_tokens >= 1 for request in made)


@pytest.mark.parametrize("arrivals", [{"arrivals": "poisson"}, {"arrivals": "gamma", "burstiness": 3.0}])
def test_rate_only_scales_gaps_between_requests(arrivals: dict) -> None:
    slow = make_workload("sharegpt", qps=5, requests=200, **arrivals)
    fast = make_workload("sharegpt", qps=20, requests=200, **arrivals)
    assert sizes(slow) == sizes(fast)
    assert [request.category for request in slow] == [request.category for request in fast]
    assert np.allclose(gaps(slow), 4 * gaps(fast))


@pytest.mark.parametrize("name", workload_names())
def test_longer_workload_starts_with_the_shorter_one(name: str) -> None:
    short = make_workload(name, qps=20, duration_s=5)
    long = make_workload(name, qps=20, duration_s=50)
    assert len(short) < len(long)
    assert long[: len(short)] == short


def test_first_limit_ends_the_workload() -> None:
    assert len(make_workload("small", qps=100, requests=20, duration_s=60)) == 20
    by_time = make_workload("small", qps=100, requests=10_000, duration_s=2)
    assert 100 < len(by_time) < 300
    assert by_time[-1].at_s < 2


def test_bounds_and_mix_do_not_change_arrivals_or_lengths() -> None:
    plain = make_workload("small", qps=10, requests=50)
    other = make_workload("small", qps=10, requests=50, slo_table="gemma-2-27b", slo_scale=2, mix={6: 1})
    assert [(a.at_s, a.prompt_tokens, a.output_tokens) for a in plain] == [
        (a.at_s, a.prompt_tokens, a.output_tokens) for a in other
    ]
    assert {(a.category, a.ttft_slo_s, a.tpot_slo_s) for a in other} == {(6, 30.0, 0.2)}


def test_poisson_arrivals_have_given_rate_and_variation_one() -> None:
    between = gaps(make_workload("small", qps=8, requests=20_000))
    assert between.mean() == pytest.approx(1 / 8, rel=0.03)
    assert between.std() / between.mean() == pytest.approx(1.0, rel=0.03)


@pytest.mark.parametrize("burstiness", [0.5, 2.0, 4.0])
def test_gamma_arrivals_have_given_rate_and_variation(burstiness: float) -> None:
    between = gaps(make_workload("small", qps=8, requests=40_000, arrivals="gamma", burstiness=burstiness))
    assert between.mean() == pytest.approx(1 / 8, rel=0.06)
    assert between.std() / between.mean() == pytest.approx(burstiness, rel=0.06)


def test_trace_is_replayed_with_its_times_and_lengths() -> None:
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


def test_trace_times_apply_to_other_lengths() -> None:
    trace = make_workload("azure-conv", arrivals="trace", window_s=300)
    sharegpt = make_workload("sharegpt", arrivals="trace", window_s=300)
    assert [a.at_s for a in sharegpt] == [a.at_s for a in trace]
    assert sizes(sharegpt) == sizes(make_workload("sharegpt", qps=1, requests=len(sharegpt)))
    assert sizes(sharegpt) != sizes(trace)


def test_trace_speed_is_set_by_factor_or_rate() -> None:
    trace = make_workload("azure-conv", arrivals="trace", window_s=300)
    fast = make_workload("azure-conv", arrivals="trace", window_s=300, speed=3)
    assert [a.at_s * 3 for a in fast] == pytest.approx([a.at_s for a in trace])
    at_rate = make_workload("azure-conv", arrivals="trace", window_s=300, qps=20)
    assert len(at_rate) == len(trace)
    assert len(at_rate) / (300 * at_rate[-1].at_s / trace[-1].at_s) == pytest.approx(20)


def test_sharegpt_excludes_and_traces_truncate_long_requests() -> None:
    sharegpt = make_workload("sharegpt", qps=1, requests=5000)
    assert max(a.prompt_tokens for a in sharegpt) <= 1024
    assert min(min(a.prompt_tokens, a.output_tokens) for a in sharegpt) >= 4
    short = make_workload("sharegpt", qps=1, requests=5000, max_prompt=100, max_output=200)
    assert max(a.prompt_tokens for a in short) <= 100
    assert sum(a.output_tokens == 200 for a in short) < 100, "no peak at the limit"
    trace = make_workload("azure-code", arrivals="trace", max_prompt=1000)
    assert len(trace) == 8819
    assert max(a.prompt_tokens for a in trace) == 1000


def test_categories_are_uniform_without_mix() -> None:
    even = np.bincount([a.category for a in make_workload("small", qps=1, requests=12_000)], minlength=7)
    assert even[0] == 0
    assert (abs(even[1:] - 2000) < 200).all()
    mixed = np.bincount(
        [a.category for a in make_workload("small", qps=1, requests=12_000, mix={1: 3, 4: 1})], minlength=7
    )
    assert mixed[1] == pytest.approx(9000, abs=200)
    assert mixed[1] + mixed[4] == 12_000


def test_category_has_bounds_of_its_table_row() -> None:
    for table in slo_table_names():
        for request in make_workload("small", qps=1, requests=60, slo_table=table, slo_scale=2):
            ttft_s, tpot_ms, e2e_s = SLO_TABLES[table][request.category - 1]
            assert (request.ttft_slo_s, request.e2e_slo_s) == (2 * ttft_s, 2 * e2e_s)
            assert request.tpot_slo_s == pytest.approx(2 * tpot_ms / 1000)


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"name": "nope"}, "sharegpt, lmsys-like, azure-conv, azure-code, code-chat, small"),
        ({"arrivals": "nope"}, "poisson, gamma, trace"),
        ({"trace": "nope", "arrivals": "trace"}, "azure-conv, azure-code"),
        ({"slo_table": "nope"}, "llama-3.1-8b, gemma-2-27b"),
        ({"qps": None}, "need qps"),
        ({"requests": None}, "set --requests or --duration"),
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
def test_invalid_argument_raises_with_accepted_values(wrong: dict, error: str) -> None:
    valid = {"name": "sharegpt", "qps": 1.0, "requests": 1}
    with pytest.raises(ValueError, match=error):
        make_workload(**{**valid, **wrong})


def test_hundred_thousand_requests_are_fast() -> None:
    dataset("sharegpt")
    started = time.process_time()
    assert len(make_workload("sharegpt", qps=50, requests=100_000)) == 100_000
    # 0.2 s on an idle core. CPU time, since others may use the machine.
    assert time.process_time() - started < 1.5


def test_data_files_are_small_and_hold_only_integers() -> None:
    for file in (DATA / f"{name}.npz" for name in ("sharegpt", "azure-conv", "azure-code")):
        assert file.stat().st_size < 300_000
        with np.load(file, allow_pickle=False) as arrays:
            assert all(np.issubdtype(arrays[name].dtype, np.unsignedinteger) for name in arrays.files)


def test_sharegpt_share_at_output_limit_matches_readme() -> None:
    outputs = dataset("sharegpt").output_tokens
    assert len(outputs) == 9385
    at_limit = ((outputs >= 767) & (outputs <= 772)).mean()
    assert f"{at_limit:.1%} of the answers have 767 to 772 tokens" in (DATA / "README.md").read_text()


def test_lmsys_like_means_match_lmsys_paper() -> None:
    prompts, outputs = np.array(sizes(make_workload("lmsys-like", qps=1, requests=40_000))).mean(axis=0)
    assert 0.9 * 69.5 < prompts < 69.5 * 1.05
    assert 0.9 * 214.5 < outputs < 214.5 * 1.05
