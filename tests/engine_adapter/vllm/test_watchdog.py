"""When an engine counts as hung."""

from __future__ import annotations

import math
import os
import time

import pytest

from engine_adapter.step_time.linear_forms import StepTimes
from engine_adapter.step_time.model import StepTimeModel
from engine_adapter.vllm.watchdog import FIRST_STEPS, STEP_FACTOR, WORKING_S, Usage, Watchdog, usage

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


def hung_after(
    watch: Watchdog,
    *,
    cpu_share: float = 0.0,
    read_rate: float = 0.0,
    works_s: float = math.inf,
    prompt_tokens: int = 0,
    budget: int = 2048,
    loading: bool = False,
) -> float:
    """Return the silence (s) after which ``watch`` finds a hang; 0 for none.

    For ``works_s`` the engine uses ``cpu_share`` of one CPU and reads ``read_rate`` bytes a second.
    """
    for check in range(1, 20_000):
        watch.add_silence(CHECK_S)
        if watch.wants_usage:
            seconds = min(check * CHECK_S, works_s)
            watch.on_usage(Usage(cpu_share * seconds, int(read_rate * seconds)))
        if watch.is_hung(1, prompt_tokens, budget, loading):
            return round(check * CHECK_S, 1)
    return 0.0


def test_silent_engine_is_hung_after_the_timeout() -> None:
    assert hung_after(watchdog(5.0)) == pytest.approx(5.0, abs=0.2)


def test_engine_is_never_hung_without_a_timeout() -> None:
    assert hung_after(watchdog(None)) == 0.0


@pytest.mark.parametrize(
    ("share", "seconds"), [(0.0, 5.0), (0.01, 5.0), (0.08, WORKING_S), (0.5, WORKING_S), (16.0, WORKING_S)]
)
def test_engine_that_uses_the_cpu_gets_more_time(share: float, seconds: float) -> None:
    assert hung_after(watchdog(5.0), cpu_share=share) == pytest.approx(seconds, rel=0.05)


def test_engine_that_reads_from_storage_gets_more_time() -> None:
    """It pages in, or a request loads an adapter."""
    assert hung_after(watchdog(5.0), read_rate=1e6) == pytest.approx(WORKING_S, rel=0.01)


@pytest.mark.parametrize("works_s", [10.0, 60.0, 100.0])
def test_engine_that_stops_working_is_found_soon_afterwards(works_s: float) -> None:
    found = hung_after(watchdog(5.0), cpu_share=1.0, works_s=works_s)
    assert works_s + 4 < found < works_s + 7


def test_slow_cpu_engine_is_not_restarted_during_a_step_that_nobody_predicted() -> None:
    """Steps took 10 ms. The next one takes two minutes, of which its processes get a tenth of a CPU."""
    watch = watchdog(5.0)
    for check in range(1, 1201):
        watch.add_silence(CHECK_S)
        if watch.wants_usage:
            watch.on_usage(Usage(0.1 * check * CHECK_S, 0))
        assert not watch.is_hung(1, 100, 2048)


def test_very_slow_steps_extend_the_limit_of_a_working_engine_too() -> None:
    watch = watchdog(5.0, step_s=50.0)
    assert hung_after(watch, cpu_share=1.0) == pytest.approx(STEP_FACTOR * 50.0, rel=0.1)


def test_unreadable_usage_counts_as_work() -> None:
    watch = watchdog(5.0)
    for _ in range(100):
        watch.add_silence(CHECK_S)
        if watch.wants_usage:
            watch.on_usage(None)
        assert not watch.is_hung(1, 0, 2048)


def test_engine_that_loads_an_adapter_gets_more_time_but_not_forever() -> None:
    assert hung_after(watchdog(5.0), loading=True) == pytest.approx(WORKING_S, rel=0.01)


def test_first_steps_of_an_engine_may_compile() -> None:
    assert hung_after(watchdog(5.0, steps=FIRST_STEPS - 1)) == pytest.approx(WORKING_S, rel=0.01)


def test_restarted_engine_may_compile_again() -> None:
    watch = watchdog(5.0)
    watch.restart()
    assert hung_after(watch) == pytest.approx(WORKING_S, rel=0.01)


@pytest.mark.parametrize("timeout_s", [1.0, 1.5])
def test_working_engine_is_not_restarted_before_its_usage_is_known(timeout_s: float) -> None:
    assert hung_after(watchdog(timeout_s), cpu_share=1.0) == pytest.approx(WORKING_S, rel=0.01)
    assert hung_after(watchdog(timeout_s)) == pytest.approx(2.0, abs=0.3)


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
    watch.on_usage(Usage(0.0, 0))
    assert not watch.is_hung(1, 0, 2048)


def test_silence_survives_clients_that_give_up() -> None:
    """The engine has no work while no client waits: that time does not count, nor does it end the silence."""
    watch = watchdog(5.0)
    for _ in range(3):
        for _ in range(20):
            watch.add_silence(CHECK_S)
    for _ in range(2):
        watch.on_usage(Usage(0.0, 0))
        watch.add_silence(CHECK_S)
    assert watch.is_hung(1, 0, 2048)


def test_usage_of_processes_grows_with_their_work_and_is_none_without_processes() -> None:
    pytest.importorskip("psutil")
    before = usage([os.getpid()])
    ends = time.process_time() + 0.1
    while time.process_time() < ends:
        pass
    after = usage([os.getpid()])
    assert before is not None and after is not None
    assert after.cpu_s - before.cpu_s >= 0.05
    assert after.read_bytes >= before.read_bytes
    assert usage([]) is None
