"""Finds a hung EngineCore: one that has work, lives, and computes no step. Also kills its processes.

Silence is the time in which the EngineCore had work and reported no step. Two limits apply to it:

- An EngineCore that waits for something is hung after ``timeout_s``, or five times as long as a step may take.
- An EngineCore that may be working is hung after `WORKING_S`, if that is longer. Its processes use the CPU or read from
  storage, it loads an adapter, or it has computed few steps yet and may compile.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from engine_adapter.step_time.model import StepTimeModel

STEP_FACTOR = 5.0
"""A step may take this multiple of its predicted time, and of the longest recent step. Generous by convention."""

RECENT_STEPS = 64
"""Steps of each kind among which the longest recent step is sought."""

WORKING_S = 180.0
"""Least limit (s) of an EngineCore that may be working. A compilation, a step on a slow CPU or the load of an adapter
takes up to minutes. A GPU that hangs keeps the CPU busy too, so this is also how long such a hang lasts. Convention."""

BUSY_SHARE = 0.05
"""Share of one CPU above which the EngineCore counts as working. The threads of one that waits poll: less than 0.01."""

FIRST_STEPS = 16
"""Steps of an EngineCore that may compile and allocate."""

LOOK_S = 1.0
"""Seconds between looks at the processes of a silent EngineCore. No interval between two checks counts for more silence
than that, so a gateway that was itself stopped does not blame the engine."""


class Usage(NamedTuple):
    """What processes have used so far: CPU time (s), and bytes read from storage."""

    cpu_s: float
    read_bytes: int


class Watchdog:
    """Decides whether one engine is hung. It has no clock and touches no process.

    Args:
        timeout_s: shortest silence after which an engine with work counts as hung; None never does.
        step_time: the engine's step-time model.

    Time without work neither adds to the silence nor ends it: clients may give up on a hung engine one by one.
    """

    def __init__(self, timeout_s: float | None, step_time: StepTimeModel) -> None:
        self.silent_s = 0.0
        self._timeout_s = timeout_s
        self._step_time = step_time
        self._steps = 0
        self._usage: Usage | None = None
        self._looked_s = 0.0
        self._idle_s = 0.0
        """The end of the silence, in which the processes did nothing."""

    def restart(self) -> None:
        """Begin anew, for a new EngineCore."""
        self._steps = 0
        self.on_progress()

    def on_progress(self, steps: int = 0) -> None:
        """Note that the engine reported something, ``steps`` steps among it."""
        self._steps += steps
        self.silent_s = self._idle_s = self._looked_s = 0.0
        self._usage = None

    def add_silence(self, elapsed_s: float) -> None:
        """Note that ``elapsed_s`` passed since the previous check while the engine had work."""
        self.silent_s += min(elapsed_s, LOOK_S)
        self._idle_s += min(elapsed_s, LOOK_S)

    @property
    def wants_usage(self) -> bool:
        """Whether `on_usage` should be called now."""
        return self._timeout_s is not None and self.silent_s >= self._looked_s + LOOK_S

    def on_usage(self, usage: Usage | None) -> None:
        """Note what the engine's processes have used so far; None if that cannot be read."""
        before, since_s = self._usage, self._looked_s
        self._usage, self._looked_s = usage, self.silent_s
        if usage is None:
            self._idle_s = 0.0
        elif before is not None:
            busy = usage.cpu_s - before.cpu_s > BUSY_SHARE * (self.silent_s - since_s)
            if busy or usage.read_bytes > before.read_bytes:
                self._idle_s = 0.0

    def is_hung(self, sequences: int, prompt_tokens: int, max_num_batched_tokens: int, loading: bool = False) -> bool:
        """Whether the silence is over the limit, with ``sequences`` in the engine.

        ``prompt_tokens``: the sum of those prompts that have not produced a token. ``loading``: an adapter is loaded.
        """
        # NOTE: the first look is only compared with. The second one is the first that can find the processes working.
        if self._timeout_s is None or self._looked_s < 2 * LOOK_S:
            return False
        limit_s = self.limit_s(sequences, min(prompt_tokens, max_num_batched_tokens))
        if self.silent_s >= max(limit_s, WORKING_S):
            return True
        return self._idle_s >= limit_s and self._steps >= FIRST_STEPS and not loading

    def limit_s(self, sequences: int, prompt_tokens: int) -> float:
        """Return the limit (s) of an EngineCore that waits, with ``prompt_tokens`` in the next step."""
        assert self._timeout_s is not None
        recent = self._step_time.latest(RECENT_STEPS)
        context = sequences * max((context for _, context, _, _ in recent), default=0.0)
        step_s = self._step_time.curve.step_s(sequences, context, prompt_tokens)
        longest_s = max((seconds for _, _, _, seconds in recent), default=0.0)
        return max(self._timeout_s, STEP_FACTOR * max(step_s, longest_s))


def pending(llm: Any) -> tuple[int, int]:
    """Return the unfinished sequences of vLLM's AsyncLLM, and the sum of the prompts that produced no token yet."""
    states = llm.output_processor.request_states
    return len(states), sum(state.prompt_len for state in states.values() if state.is_prefilling)


def core_pids(llm: Any) -> list[int]:
    """Return the process ids of the EngineCores that ``llm``, vLLM's AsyncLLM, started; [] if Ray runs them."""
    processes = getattr(llm.engine_core.resources.engine_manager, "processes", ())
    return [process.pid for process in processes if process.pid is not None]


def usage(pids: Iterable[int]) -> Usage | None:
    """Return what processes and their descendants have used so far; None if it cannot be read."""
    import psutil

    found, cpu_s, read_bytes = False, 0.0, 0
    for process in _trees(pids):
        # NOTE: psutil has no io_counters on macOS.
        with contextlib.suppress(psutil.Error, AttributeError):
            times = process.cpu_times()
            found, cpu_s = True, cpu_s + times.user + times.system
            read_bytes += process.io_counters().read_bytes
    return Usage(cpu_s, read_bytes) if found else None


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
