from __future__ import annotations

import pytest

from engine_adapter.engine import EngineState
from engine_adapter.remote.step_samples import SAMPLE_EVERY, StepSampler, StreamTiming
from engine_adapter.step_time.linear_forms import StepTimes
from engine_adapter.step_time.model import StepTimeModel


class RecordedSteps(StepTimeModel):
    """Remembers (decoding requests, prefill tokens, mean context, seconds) of each sample."""

    def __init__(self) -> None:
        super().__init__(times=StepTimes(b=0, d=0.01))
        self.seen: list[tuple[float, int, float, float]] = []

    def observe(self, decode_requests: float, prefill_tokens: int, mean_context: float, elapsed_s: float) -> None:
        self.seen.append((decode_requests, prefill_tokens, mean_context, elapsed_s))


def sampler() -> tuple[StepSampler, RecordedSteps]:
    steps = RecordedSteps()
    return StepSampler(EngineState(step_time=steps)), steps


def stream(sampler: StepSampler, stream: StreamTiming, tokens: int, start: float, gap: float, at_once: int = 1) -> None:
    for i in range(0, tokens, at_once):
        sampler.tokens(stream, at_once, start + (i + at_once) * gap)


def test_twenty_tokens_give_one_sample_of_the_median_gap() -> None:
    timings, steps = sampler()
    one = timings.sent(0.0, 100, 1)
    timings.tokens(one, 1, 0.5)
    stream(timings, one, SAMPLE_EVERY - 1, 0.5, 0.02)
    assert steps.seen == []
    timings.tokens(one, 1, 5.0)
    ((batch, prefill, context, seconds),) = steps.seen
    assert (batch, prefill, context) == (1, 0, 121)
    assert seconds == pytest.approx(0.02), "one stall does not matter"


def test_tokens_that_arrive_together_share_the_gap() -> None:
    timings, steps = sampler()
    one = timings.sent(0.0, 100, 1)
    timings.tokens(one, 1, 0.5)
    stream(timings, one, SAMPLE_EVERY, 0.5, 0.02, at_once=4)
    assert steps.seen[0][3] == pytest.approx(0.02)


def test_gated_streams_count_by_share_and_only_the_strictest_is_sampled() -> None:
    timings, steps = sampler()
    strict, loose = timings.sent(0.0, 100, 1, tpot_ms=50), timings.sent(0.0, 100, 2, tpot_ms=100)
    timings.tokens(strict, 1, 0.1)
    timings.tokens(loose, 2, 0.1)
    stream(timings, loose, SAMPLE_EVERY, 0.1, 0.04)  # in every other step
    assert steps.seen == []
    stream(timings, strict, SAMPLE_EVERY, 0.1, 0.02)
    ((batch, _, _, seconds),) = steps.seen
    assert batch == 2  # one, and two that run half of the time
    assert seconds == pytest.approx(0.02)


def test_batch_includes_all_streaming_sequences() -> None:
    timings, steps = sampler()
    one, two = timings.sent(0.0, 100, 1), timings.sent(0.0, 50, 2)
    timings.tokens(one, 1, 0.1)
    timings.tokens(two, 2, 0.1)
    stream(timings, one, SAMPLE_EVERY, 0.1, 0.02)
    assert steps.seen[0][0] == 3
    timings.finished(two, None)
    stream(timings, one, SAMPLE_EVERY, 0.5, 0.02)
    assert steps.seen[1][0] == 1


def test_single_prefill_gives_a_sample() -> None:
    timings, steps = sampler()
    one = timings.sent(0.0, 30, 1)
    timings.tokens(one, 1, 0.2)
    assert timings.finished(one, 400)
    assert steps.seen == [(0, 400, 0.0, 0.2)]


def test_prefill_during_decodes_subtracts_half_a_step() -> None:
    timings, steps = sampler()
    other = timings.sent(0.0, 30, 1)
    timings.tokens(other, 1, 0.1)
    one = timings.sent(1.0, 30, 1)
    timings.tokens(one, 1, 1.2)
    timings.finished(one, 400)
    assert steps.seen == [(1, 400, 31.0, pytest.approx(0.195))]


@pytest.mark.parametrize("computed", [None, 0, 5000])
def test_prefill_of_unknown_length_or_several_steps_gives_no_sample(computed: int | None) -> None:
    timings, steps = sampler()
    one = timings.sent(0.0, 30, 1)
    timings.tokens(one, 1, 0.2)
    assert not timings.finished(one, computed)
    assert steps.seen == []


def test_concurrent_prefills_give_no_sample() -> None:
    timings, steps = sampler()
    one, two = timings.sent(0.0, 30, 1), timings.sent(0.01, 30, 1)
    for timing in (one, two):
        timings.tokens(timing, 1, 0.2)
        assert not timings.finished(timing, 100)
    three = timings.sent(1.0, 30, 1)
    timings.tokens(three, 1, 1.1)
    assert timings.finished(three, 100)
    assert len(steps.seen) == 1


def test_failed_request_does_not_affect_later_samples() -> None:
    timings, _ = sampler()
    assert not timings.finished(timings.sent(0.0, 30, 1), None)
    one = timings.sent(1.0, 30, 1)
    timings.tokens(one, 1, 1.1)
    assert timings.finished(one, 100)
