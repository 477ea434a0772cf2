from __future__ import annotations

import math
import random

import pytest

from engine_adapter.engine import EngineState
from engine_adapter.remote.step_samples import (
    GAP_DECAY,
    GAP_FACTOR,
    PREFILL_FACTOR,
    SAMPLE_EVERY,
    SILENCE_S,
    StepSampler,
    StreamTiming,
)
from engine_adapter.step_time.linear_forms import StepTimes
from engine_adapter.step_time.model import StepTimeModel


class RecordedSteps(StepTimeModel):
    """Records (decoding requests, prefill tokens, mean context, seconds) of each sample."""

    def __init__(self) -> None:
        super().__init__(times=StepTimes(b=0, d=0.01))
        self.samples: list[tuple[float, int, float, float]] = []

    def observe(self, decode_requests: float, prefill_tokens: int, mean_context: float, elapsed_s: float) -> None:
        self.samples.append((decode_requests, prefill_tokens, mean_context, elapsed_s))


def make_sampler() -> tuple[StepSampler, RecordedSteps]:
    steps = RecordedSteps()
    return StepSampler(EngineState(step_time=steps)), steps


def deliver(
    sampler: StepSampler, request: StreamTiming, tokens: int, start: float, gap: float, per_read: int = 1
) -> None:
    for i in range(0, tokens, per_read):
        sampler.tokens(request, per_read, start + (i + per_read) * gap)


def test_twenty_tokens_give_one_sample_of_the_median_gap() -> None:
    sampler, steps = make_sampler()
    first = sampler.sent(0.0, 100, 1)
    sampler.tokens(first, 1, 0.5)
    deliver(sampler, first, SAMPLE_EVERY - 1, 0.5, 0.02)
    assert steps.samples == []
    sampler.tokens(first, 1, 5.0)
    ((batch, prefill, context, seconds),) = steps.samples
    assert (batch, prefill, context) == (1, 0, 121)
    assert seconds == pytest.approx(0.02), "the median ignores one stall"


def test_tokens_that_arrive_together_share_the_gap() -> None:
    sampler, steps = make_sampler()
    request = sampler.sent(0.0, 100, 1)
    sampler.tokens(request, 1, 0.5)
    deliver(sampler, request, SAMPLE_EVERY, 0.5, 0.02, per_read=4)
    assert steps.samples[0][3] == pytest.approx(0.02)


def test_gated_streams_count_by_share_and_only_the_strictest_is_sampled() -> None:
    sampler, steps = make_sampler()
    strict, loose = sampler.sent(0.0, 100, 1, tpot_ms=50), sampler.sent(0.0, 100, 2, tpot_ms=100)
    sampler.tokens(strict, 1, 0.1)
    sampler.tokens(loose, 2, 0.1)
    deliver(sampler, loose, SAMPLE_EVERY, 0.1, 0.04)  # decodes in every other step
    assert steps.samples == []
    deliver(sampler, strict, SAMPLE_EVERY, 0.1, 0.02)
    ((batch, _, _, seconds),) = steps.samples
    assert batch == 2, "one sequence, and two that decode in half of the steps"
    assert seconds == pytest.approx(0.02)


def test_batch_includes_all_streaming_sequences() -> None:
    sampler, steps = make_sampler()
    first, second = sampler.sent(0.0, 100, 1), sampler.sent(0.0, 50, 2)
    sampler.tokens(first, 1, 0.1)
    sampler.tokens(second, 2, 0.1)
    deliver(sampler, first, SAMPLE_EVERY, 0.1, 0.02)
    assert steps.samples[0][0] == 3
    sampler.finished(second, None)
    deliver(sampler, first, SAMPLE_EVERY, 0.5, 0.02)
    assert steps.samples[1][0] == 1


def test_single_prefill_gives_a_sample() -> None:
    sampler, steps = make_sampler()
    request = sampler.sent(0.0, 30, 1)
    sampler.tokens(request, 1, 0.2)
    assert sampler.finished(request, 400)
    assert steps.samples == [(0, 400, 0.0, 0.2)]


def test_prefill_during_decodes_subtracts_half_a_step() -> None:
    sampler, steps = make_sampler()
    other = sampler.sent(0.0, 30, 1)
    sampler.tokens(other, 1, 0.1)
    request = sampler.sent(1.0, 30, 1)
    sampler.tokens(request, 1, 1.2)
    sampler.finished(request, 400)
    assert steps.samples == [(1, 400, 31.0, pytest.approx(0.195))]


@pytest.mark.parametrize("computed", [None, 0, 5000])
def test_prefill_of_unknown_length_or_several_steps_gives_no_sample(computed: int | None) -> None:
    sampler, steps = make_sampler()
    request = sampler.sent(0.0, 30, 1)
    sampler.tokens(request, 1, 0.2)
    assert not sampler.finished(request, computed)
    assert steps.samples == []


def test_concurrent_prefills_give_no_sample() -> None:
    sampler, steps = make_sampler()
    first, second = sampler.sent(0.0, 30, 1), sampler.sent(0.01, 30, 1)
    for timing in (first, second):
        sampler.tokens(timing, 1, 0.2)
        assert not sampler.finished(timing, 100)
    third = sampler.sent(1.0, 30, 1)
    sampler.tokens(third, 1, 1.1)
    assert sampler.finished(third, 100)
    assert len(steps.samples) == 1


def test_failed_request_does_not_affect_later_samples() -> None:
    sampler, _ = make_sampler()
    assert not sampler.finished(sampler.sent(0.0, 30, 1), None)
    request = sampler.sent(1.0, 30, 1)
    sampler.tokens(request, 1, 1.1)
    assert sampler.finished(request, 100)


def test_silence_limit_is_infinite_until_a_stream_has_begun() -> None:
    sampler = StepSampler(EngineState())
    assert sampler.silence_limit_s() == math.inf
    stream = sampler.sent(0.0, 10, 1)
    assert sampler.silence_limit_s() == math.inf
    sampler.tokens(stream, 1, 1.0)
    assert sampler.silence_limit_s() == SILENCE_S
    sampler.finished(stream, None)
    assert sampler.silence_limit_s() == math.inf


def test_silence_limit_follows_the_longest_gap_and_forgets_it() -> None:
    sampler = StepSampler(EngineState())
    stream = sampler.sent(0.0, 10, 1)
    for at in (1.0, 31.0, 31.1):
        sampler.tokens(stream, 1, at)
    assert sampler.silence_limit_s() == pytest.approx(GAP_FACTOR * 30.0 * GAP_DECAY)
    for _ in range(500):
        sampler.silence_limit_s()
    assert sampler.silence_limit_s() == SILENCE_S


def test_silence_limit_covers_the_prompts_that_the_server_has() -> None:
    state = EngineState(step_time=StepTimeModel(StepTimes(alpha=0.01)))
    sampler = StepSampler(state)
    sampler.tokens(sampler.sent(0.0, 10, 1), 1, 1.0)
    sampler.sent(1.0, 5000, 1)
    assert sampler.silence_limit_s() == pytest.approx(PREFILL_FACTOR * state.step_time.prefill(5000))


def test_streams_that_may_pause_are_silent_only_if_the_server_reports_no_progress() -> None:
    sampler = StepSampler(EngineState())
    call = sampler.sent(0.0, 10, 1, may_pause=True)
    sampler.tokens(call, 1, 1.0)
    assert sampler.silence_limit_s() == math.inf
    assert sampler.silence_limit_s(reports_progress=True) == SILENCE_S
    text = sampler.sent(1.0, 10, 1)
    assert sampler.silence_limit_s() == math.inf, "it has not begun"
    sampler.tokens(text, 1, 2.0)
    assert sampler.silence_limit_s() == SILENCE_S, "a server that sends it nothing hangs"
    sampler.finished(text, None)
    sampler.finished(sampler.sent(2.0, 10, 1, may_pause=True), None)
    assert sampler.silence_limit_s() == math.inf
    sampler.finished(call, None)
    sampler.tokens(sampler.sent(3.0, 10, 1), 1, 4.0)
    assert sampler.silence_limit_s() == SILENCE_S


@pytest.mark.parametrize("seed", range(5))
def test_batch_at_a_first_token_counts_every_decoding_stream(seed: int) -> None:
    chance = random.Random(seed)
    sampler, _ = make_sampler()
    decoding: list[StreamTiming] = []
    for at in range(60):
        if decoding and chance.random() < 0.4:
            sampler.finished(decoding.pop(chance.randrange(len(decoding))), None)
        for stream in decoding:
            sampler.tokens(stream, chance.choice([1, 2.5]), float(at))
        stream = sampler.sent(at, chance.randint(1, 500), chance.randint(1, 3), chance.choice([None, 50.0, 100.0]))
        sampler.tokens(stream, 1, float(at))
        strictest = min((s.tpot_ms for s in decoding if s.tpot_ms), default=math.inf)
        sequences = sum(s.sequences for s in decoding)
        batch = sum(s.sequences * (strictest / s.tpot_ms if s.tpot_ms else 1) for s in decoding)
        context = sum(s.prompt_tokens * s.sequences + s.tokens for s in decoding) / sequences if sequences else 0
        assert stream.batch_at_first == pytest.approx(batch)
        assert stream.context_at_first == pytest.approx(context)
        decoding.append(stream)
