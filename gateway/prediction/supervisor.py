"""A child process that must be there: started, restarted with back-off when it dies, stopped by pid."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import time
from collections.abc import Callable, Sequence

log = logging.getLogger("antares.supervisor")

_BACKOFF_S = (0.5, 1.0, 2.0, 5.0, 15.0)
_STEADY_S = 30.0
"""A child that lived this long had started well: the next failure begins at the shortest back-off again."""


class Supervisor:
    """Keeps ``command`` running. ``on_restart`` is called each time it is started again."""

    def __init__(self, name: str, command: Sequence[str], on_restart: Callable[[], None] = lambda: None) -> None:
        self.name = name
        self.restarts = 0
        self._command = list(command)
        self.on_restart = on_restart
        self._process: asyncio.subprocess.Process | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        """The child's pid while it runs."""
        running = self._process is not None and self._process.returncode is None
        return self._process.pid if running and self._process else None

    async def start(self) -> None:
        """Start the child and watch over it."""
        await self._spawn()
        self._task = asyncio.create_task(self._watch(), name=f"supervise {self.name}")

    async def stop(self, timeout_s: float = 5.0) -> None:
        """SIGTERM, then SIGKILL after ``timeout_s``. Idempotent."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            self._task = None
        process, self._process = self._process, None
        if process is None or process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(timeout_s):
                await process.wait()
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    async def _spawn(self) -> None:
        # A session of its own: Ctrl-C in the terminal reaches the gateway alone, which drains before it stops us.
        self._process = await asyncio.create_subprocess_exec(*self._command, start_new_session=True)

    async def _spawned(self) -> bool:
        """Start the child again; False when the system would not (out of processes or memory, the file is gone)."""
        try:
            await self._spawn()
        except OSError as error:
            log.warning("%s cannot be started: %s", self.name, error.strerror)
            return False
        return True

    async def _watch(self) -> None:
        failures = 0
        while True:
            assert self._process is not None
            started = time.monotonic()
            code = await self._process.wait()
            failures = 0 if time.monotonic() - started > _STEADY_S else failures + 1
            wait = _BACKOFF_S[min(max(failures - 1, 0), len(_BACKOFF_S) - 1)]
            log.warning("%s ended with code %s; starting it again in %.1f s", self.name, code, wait)
            await asyncio.sleep(wait)
            while not await self._spawned():
                await asyncio.sleep(_BACKOFF_S[-1])
            self.restarts += 1
            self.on_restart()
