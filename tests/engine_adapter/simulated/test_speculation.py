"""Speculative decoding of the simulated scheduler. `test_steps_as_simulated.py` compares its steps with vLLM's."""

from __future__ import annotations

import pytest

from engine_adapter.simulated.scheduler import SimulatedScheduler
from engine_adapter.simulated.sequence import SimulatedSequence
from engine_adapter.simulated.speculation import RandomAcceptance
from engine_adapter.step_report import StepReport


@pytest.mark.parametrize(("rate", "expected"), [(0.0, 0.0), (0.4, 0.624), (0.6, 1.176), (0.8, 1.952), (1.0, 3.0)])
def test_accepted_drafts_have_the_expected_mean(rate: float, expected: float) -> None:
    speculation, sequence = RandomAcceptance(3, rate), SimulatedSequence("r", 1, 1)
    counts = [speculation.accepted(sequence, 3) for _ in range(20_000)]
    assert sum(counts) / len(counts) == pytest.approx(expected, abs=0.03)
    assert min(counts) >= 0
    assert max(counts) <= 3


@pytest.mark.parametrize("wrong", [{"draft_tokens": -1}, {"rate": 1.1}, {"rate": -0.1}, {"draft_s": -1.0}])
def test_impossible_speculation_is_rejected(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="speculation needs"):
        RandomAcceptance(**wrong)  # type: ignore[arg-type]


def test_answer_has_its_length_and_steps_are_counted_apart() -> None:
    scheduler = SimulatedScheduler(
        max_num_seqs=4,
        max_num_batched_tokens=64,
        max_model_len=100,
        kv_tokens=400,
        speculation=RandomAcceptance(3, 1.0),
    )
    sequence = SimulatedSequence("r", 20, 10)
    scheduler.submit(sequence)
    reports, generated = [], []
    while scheduler.running or scheduler.waiting:
        step = scheduler.plan(0.0)
        scheduler.finish(step)
        reports.append(step.report(0.01))
        generated.append(sequence.generated)
    assert generated == [1, 5, 9, 10], "the last step accepts more than the answer takes"
    assert reports[0] == StepReport(0, 20, 0.0, 0.01)
    assert reports[1] == StepReport(1, 0, 21.0, 0.01, 1, 3, 3, 0, 1)
    assert scheduler.kv_usage == 0
