"""Finds a hung EngineCore: one that has work, lives, and computes no step. Also kills its processes."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterable, Iterator
from typing import Any

from engine_adapter.step_time.model import StepTimeModel

STEP_FACTOR = 5.0
"""A step may take this multiple of its predicted time, and of the longest recent step. Generous by convention."""

RECENT_STEPS = 64
"""Steps of each kind among which the longest recent step is sought."""

BUSY_FACTOR = 12.0
"""The limit grows by this factor while the EngineCore uses the CPU: it may be compiling a kernel, or be starved of CPU
time by other processes. With the default limit that is one minute."""

BUSY_SHARE = 0.05
"""Share of one CPU above which the EngineCore counts as busy. One that waits uses less than 0.01: its threads poll."""

FIRST_STEPS = 16
FIRST_STEPS_S = 180.0
"""Limit (s) of the first `FIRST_STEPS` steps of an EngineCore, which may compile and allocate."""

LOOK_S = 1.0
"""Seconds between looks at the CPU time of a silent EngineCore. No interval between two checks counts for more silence
than that, so a gateway that was itself stopped does not blame the engine."""


class Watchdog:
    """Decides whether one engine is hung. It has no clock and touches no process.

    Args:
        timeout_s: shortest silence after which an engine with work counts as hung; None never does.
        step_time: the engine's step-time model.

    Silence is the time in which the engine had work and reported no step. Time without work neither adds to it nor
    ends it: clients may give up on a hung engine one by one.
    """

    def __init__(self, timeout_s: float | None, step_time: StepTimeModel) -> None:
        self.silent_s = 0.0
        self._timeout_s = timeout_s
        self._step_time = step_time
        self._steps = 0
        self._cpu_s: float | None = None
        self._cpu_since_s = self._looked_s = 0.0
        self._busy = False

    def restart(self) -> None:
        """Begin anew, for a new EngineCore."""
        self._steps = 0
        self.on_progress()

    def on_progress(self, steps: int = 0) -> None:
        """Note that the engine reported something, ``steps`` steps among it."""
        self._steps += steps
        self.silent_s = self._looked_s = 0.0
        self._cpu_s = None
        self._busy = False

    def add_silence(self, elapsed_s: float) -> None:
        """Note that ``elapsed_s`` passed since the previous check while the engine had work."""
        self.silent_s += min(elapsed_s, LOOK_S)

    @property
    def wants_cpu_s(self) -> bool:
        """Whether `on_cpu_s` should be called now."""
        return self._timeout_s is not None and self.silent_s >= self._looked_s + LOOK_S

    def on_cpu_s(self, cpu_s: float | None) -> None:
        """Note the CPU time (s) that the engine's processes have used so far; None if that cannot be read."""
        self._looked_s = self.silent_s
        if cpu_s is None:
            self._busy = True
        elif self._cpu_s is None:
            self._cpu_s, self._cpu_since_s = cpu_s, self.silent_s
        else:
            self._busy = cpu_s - self._cpu_s > BUSY_SHARE * (self.silent_s - self._cpu_since_s)

    def is_hung(self, sequences: int, prompt_tokens: int, max_num_batched_tokens: int) -> bool:
        """Whether the silence is over the limit, with ``sequences`` in the engine.

        ``prompt_tokens``: the sum of those prompts that have not produced a token.
        """
        if self._timeout_s is None or self.silent_s < self._timeout_s or not self._looked_s:
            return False
        return self.silent_s >= self.limit_s(sequences, min(prompt_tokens, max_num_batched_tokens))

    def limit_s(self, sequences: int, prompt_tokens: int) -> float:
        """Return the silence (s) after which the engine counts as hung, with ``prompt_tokens`` in the next step."""
        assert self._timeout_s is not None
        recent = self._step_time.latest(RECENT_STEPS)
        context = sequences * max((context for _, context, _, _ in recent), default=0.0)
        step_s = self._step_time.curve.step_s(sequences, context, prompt_tokens)
        longest_s = max((seconds for _, _, _, seconds in recent), default=0.0)
        limit_s = max(self._timeout_s, STEP_FACTOR * max(step_s, longest_s))
        if self._busy:
            limit_s *= BUSY_FACTOR
        return limit_s if self._steps >= FIRST_STEPS else max(limit_s, FIRST_STEPS_S)


def pending(llm: Any) -> tuple[int, int]:
    """Return the unfinished sequences of vLLM's AsyncLLM, and the sum of the prompts that produced no token yet."""
    states = llm.output_processor.request_states
    return len(states), sum(state.prompt_len for state in states.values() if state.is_prefilling)


def core_pids(llm: Any) -> list[int]:
    """Return the process ids of the EngineCores that ``llm``, vLLM's AsyncLLM, started; [] if Ray runs them."""
    processes = getattr(llm.engine_core.resources.engine_manager, "processes", ())
    return [process.pid for process in processes if process.pid is not None]


def cpu_s(pids: Iterable[int]) -> float | None:
    """Return the CPU time (s) that processes and their descendants have used; None if it cannot be read."""
    import psutil  # installed with vLLM

    total: float | None = None
    for process in _trees(pids):
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            total = (total or 0.0) + times.user + times.system
    return total


def kill(pids: Iterable[int]) -> None:
    """Kill processes and their descendants. SIGKILL also ends a stopped process."""
    for process in list(_trees(pids)):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(process.pid, signal.SIGKILL)


def _trees(pids: Iterable[int]) -> Iterator[Any]:
    import psutil

    for pid in pids:
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(pid)
            yield from process.children(recursive=True)
            yield process
