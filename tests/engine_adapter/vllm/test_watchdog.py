"""When an engine counts as hung."""

from __future__ import annotations

import pytest

from engine_adapter.step_time.linear_forms import StepTimes
from engine_adapter.step_time.model import StepTimeModel
from engine_adapter.vllm.watchdog import BUSY_FACTOR, FIRST_STEPS, FIRST_STEPS_S, STEP_FACTOR, Watchdog

CHECK_S = 0.1


def watchdog(timeout_s: float | None = 5.0, *, steps: int = FIRST_STEPS, step_s: float = 0.01) -> Watchdog:
    """A watchdog of an engine that has done ``steps`` steps of ``step_s``, and takes 1 ms for each prompt token."""
    model = StepTimeModel(StepTimes(d=step_s, alpha=0.001))
    watch = Watchdog(timeout_s, model)
    watch.restart()
    for _ in range(steps):
        model.observe(1, 0, 100.0, step_s)
        watch.on_progress(1)
    return watch


def hung_after(watch: Watchdog, *, cpu_share: float = 0.0, prompt_tokens: int = 0, budget: int = 2048) -> float:
    """Silence (s) after which ``watch`` finds a hang while the engine uses ``cpu_share`` of one CPU; 0 for none."""
    for check in range(1, 20_000):
        watch.add_silence(CHECK_S)
        if watch.wants_cpu_s:
            watch.on_cpu_s(cpu_share * check * CHECK_S)
        if watch.is_hung(1, prompt_tokens, budget):
            return round(check * CHECK_S, 1)
    return 0.0


def test_silent_engine_is_hung_after_the_timeout() -> None:
    assert hung_after(watchdog(5.0)) == pytest.approx(5.0, abs=0.2)


def test_engine_is_never_hung_without_a_timeout() -> None:
    assert hung_after(watchdog(None)) == 0.0


@pytest.mark.parametrize(("share", "factor"), [(0.0, 1.0), (0.01, 1.0), (0.5, BUSY_FACTOR), (16.0, BUSY_FACTOR)])
def test_engine_that_uses_the_cpu_gets_more_time(share: float, factor: float) -> None:
    assert hung_after(watchdog(5.0), cpu_share=share) == pytest.approx(5.0 * factor, rel=0.05)


def test_unreadable_cpu_time_counts_as_busy() -> None:
    watch = watchdog(5.0)
    for _ in range(100):
        watch.add_silence(CHECK_S)
        if watch.wants_cpu_s:
            watch.on_cpu_s(None)
        assert not watch.is_hung(1, 0, 2048)


def test_first_steps_of_an_engine_may_compile() -> None:
    assert hung_after(watchdog(5.0, steps=FIRST_STEPS - 1)) == pytest.approx(FIRST_STEPS_S, rel=0.01)


def test_restarted_engine_may_compile_again() -> None:
    watch = watchdog(5.0)
    watch.restart()
    assert hung_after(watch) == pytest.approx(FIRST_STEPS_S, rel=0.01)


def test_long_recent_steps_extend_the_limit() -> None:
    assert hung_after(watchdog(5.0, step_s=3.0)) == pytest.approx(STEP_FACTOR * 3.0, rel=0.1)


@pytest.mark.parametrize(("prompt_tokens", "budget", "seconds"), [(8000, 8192, 40), (8000, 2048, 10.3), (800, 8192, 5)])
def test_limit_covers_the_prefill_of_the_next_step(prompt_tokens: int, budget: int, seconds: float) -> None:
    found = hung_after(watchdog(5.0), prompt_tokens=prompt_tokens, budget=budget)
    assert found == pytest.approx(seconds, rel=0.05)


def test_step_ends_the_silence() -> None:
    watch = watchdog(5.0)
    for _ in range(200):
        for _ in range(45):
            watch.add_silence(CHECK_S)
            assert not watch.is_hung(1, 0, 2048)
        watch.on_progress()
    assert hung_after(watch) == pytest.approx(5.0, abs=0.2)


def test_gateway_that_was_stopped_blames_no_engine() -> None:
    watch = watchdog(5.0)
    watch.add_silence(3600.0)
    watch.on_cpu_s(0.0)
    assert not watch.is_hung(1, 0, 2048)


def test_silence_survives_clients_that_give_up() -> None:
    """The engine has no work while no client waits: that time does not count, nor does it end the silence."""
    watch = watchdog(5.0)
    for _ in range(3):
        for _ in range(20):
            watch.add_silence(CHECK_S)
    watch.on_cpu_s(0.0)
    watch.add_silence(CHECK_S)
    watch.on_cpu_s(0.0)
    assert watch.is_hung(1, 0, 2048)
