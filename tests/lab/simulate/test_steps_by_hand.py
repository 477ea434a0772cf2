"""The simulator: step times computed by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from engine_adapter.simulated.scheduler import STEP_MODES
from gateway.policies.registry import POLICIES
from tests.fixtures.simulations import HAND, request, run, times

# Whole simulations are four times slower under a coverage tracer; unit tests cover the same code.
pytestmark = pytest.mark.no_cover


@pytest.mark.parametrize("mode", STEP_MODES)
@pytest.mark.parametrize("policy", POLICIES)
def test_single_request_takes_prefill_plus_decode_steps(policy: str, mode: str) -> None:
    result = run([request(at=3.0)], policy, step_mode=mode)
    assert times(result.results[0]) == pytest.approx((0.11, 0.011, 0.11 + 9 * 0.011))
    assert result.duration_s == pytest.approx(3.0 + 0.11 + 9 * 0.011)
    assert result.busy_s == pytest.approx(0.11 + 9 * 0.011)
    assert (result.steps, result.preemptions) == (10, 0)


def test_single_token_answer_ends_with_prefill() -> None:
    assert times(run([request(output=1)]).results[0]) == pytest.approx((0.11, 0.0, 0.11))


def test_long_prompt_is_chunked_only_in_chunked_mode() -> None:
    narrow = replace(HAND, max_num_batched_tokens=40)
    assert run([request()], profile=narrow).results[0].ttft_s == pytest.approx(0.05 + 0.05 + 0.03)
    assert run([request()], profile=narrow, step_mode="prefill-first").results[0].ttft_s == pytest.approx(0.11)


TWO = [request(0.0, 100, 3), request(0.05, 50, 2)]


def test_overlapping_requests_in_chunked_mode() -> None:
    # To 110 ms: prefill of a. To 171: decode of a and prefill of b. To 183: both decode.
    result = run(TWO)
    assert times(result.results[0]) == pytest.approx((0.110, (0.183 - 0.110) / 2, 0.183))
    assert times(result.results[1]) == pytest.approx((0.171 - 0.05, 0.012, 0.183 - 0.05))
    assert (result.duration_s, result.steps) == (pytest.approx(0.183), 3)


def test_overlapping_requests_in_prefill_first_mode() -> None:
    # To 110 ms: prefill of a. To 170: prefill of b. To 182: both decode. To 193: a decodes.
    result = run(TWO, step_mode="prefill-first")
    assert times(result.results[0]) == pytest.approx((0.110, (0.193 - 0.110) / 2, 0.193))
    assert times(result.results[1]) == pytest.approx((0.170 - 0.05, 0.012, 0.182 - 0.05))
    assert (result.duration_s, result.steps) == (pytest.approx(0.193), 4)


def test_async_scheduling_delays_new_request_by_one_step() -> None:
    # To 110 ms: prefill of a. To 121: a decodes, planned before b arrived. To 182: both. To 193: b decodes.
    result = run(TWO, profile=replace(HAND, plans_ahead=True))
    assert times(result.results[0]) == pytest.approx((0.110, (0.182 - 0.110) / 2, 0.182))
    assert times(result.results[1]) == pytest.approx((0.182 - 0.05, 0.011, 0.193 - 0.05))
    assert (result.duration_s, result.steps) == (pytest.approx(0.193), 4)


def test_colocated_gateway_admits_request_one_step_earlier() -> None:
    # To 110 ms: prefill of a. To 221: decode of a and prefill of b. To 233: both decode, and a finishes.
    # To 294: the colocated gateway has admitted c. A separate gateway reacts during a decode of b, which ends at 244.
    workload = [request(output=3), request(), request(prompt=50, output=1)]
    colocated, separate = (
        run(workload, "s3", replace(HAND, max_num_seqs=2), colocated_gateway=flag).results[2].ttft_s
        for flag in (True, False)
    )
    assert (colocated, separate) == (pytest.approx(0.294), pytest.approx(0.244 + 0.061))


def test_request_that_arrives_at_step_end_joins_next_step() -> None:
    end = HAND.step_seconds(0, 0, 100, 0)
    assert run([request(), request(at=end, prompt=50, output=1)]).results[1].ttft_s == pytest.approx(0.061)


def test_duration_includes_idle_time_and_busy_time_does_not() -> None:
    result = run([request(), request(at=100.0)])
    assert result.duration_s == pytest.approx(100.0 + 0.11 + 0.099)
    assert result.busy_s == pytest.approx(2 * (0.11 + 0.099))


def test_mooncake_rejects_by_step_times_of_profile() -> None:
    # At 50 ms the first prompt still counts in full, because it has no token yet: 110 + 110 ms.
    late = request(0.05, ttft=0.2)
    result = run([request(), late, replace(late, ttft_slo_s=0.25)], "mooncake", learn=False)
    assert [s.outcome for s in result.results] == ["finished", "rejected", "finished"]
    assert (result.results[1].reason, result.results[1].ttft_s) == ("ttft_unattainable", None)


def test_scorpio_rejects_waiting_request_near_deadline() -> None:
    full = replace(HAND, max_num_seqs=1)
    result = run([request(output=500), request(0.2, ttft=1.0)], "scorpio", full, learn=False)
    assert [s.outcome for s in result.results] == ["finished", "rejected"]
    assert result.results[1].reason == "ttft_unattainable"
    only = run([request(at=7.0, ttft=0.05)], "scorpio", learn=False)
    assert (only.results[0].outcome, only.duration_s, only.steps) == ("rejected", 7.0, 0)


@pytest.mark.parametrize("mode", STEP_MODES)
def test_scorpio_credits_halve_decode_steps_of_double_bound(mode: str) -> None:
    pair = [request(prompt=10, output=121, tpot=0.03), request(prompt=10, output=51, tpot=0.06)]
    strict, loose = run(pair, "scorpio", step_mode=mode).results
    assert loose.tpot_s == pytest.approx(2 * 0.0115, rel=0.02)
    assert strict.tpot_s == pytest.approx(0.0115, rel=0.05)
    strict, loose = run(pair, "ttft_guard_only", step_mode=mode).results
    assert loose.tpot_s == pytest.approx(0.012, rel=0.02), "no gate without the TPOT guard"
