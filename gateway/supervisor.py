"""Run a child process and restart it with back-off when it exits."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import time
from collections.abc import Callable, Mapping, Sequence

log = logging.getLogger("antares.supervisor")

_BACKOFF_S = (0.5, 1.0, 2.0, 5.0, 15.0)
"""Delay before each restart after consecutive failures, in seconds. The last one repeats."""

_STABLE_S = 30.0
"""Run time after which a child counts as started, in seconds. Its next failure gets the shortest back-off."""


class Supervisor:
    """Keeps ``command`` running. Calls ``on_restart`` after each restart.

    ``backoff_s``: delays before restarts after consecutive failures, `_BACKOFF_S` by default. ``environment``: of the
    child, by default this process's own. ``keep`` gets each exit code and returns whether to start the child again.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        on_restart: Callable[[], None] = lambda: None,
        backoff_s: Sequence[float] | None = None,
        environment: Mapping[str, str] | None = None,
        keep: Callable[[int], bool] = lambda code: True,
    ) -> None:
        self.name = name
        self.command = list(command)
        self.restarts = 0
        self._backoff_s = backoff_s or _BACKOFF_S
        self.on_restart = on_restart
        self._environment, self._keep = environment, keep
        self._process: asyncio.subprocess.Process | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        """The child's process id, or None if it does not run."""
        process = self._process
        return None if process is None or process.returncode is not None else process.pid

    async def start(self) -> None:
        """Start the child, and the task that restarts it."""
        await self._spawn()
        self._task = asyncio.create_task(self._watch(), name=f"supervise {self.name}")

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the child, if it runs."""
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)

    async def stop(self, timeout_s: float | None = 5.0) -> int | None:
        """Send SIGTERM, then SIGKILL after ``timeout_s`` seconds (None: never).

        Returns the exit code, None if no child ran.
        """
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            self._task = None
        if self.pid is None or self._process is None:
            return None
        self.send(signal.SIGTERM)
        try:
            async with asyncio.timeout(timeout_s):
                return await self._process.wait()
        except TimeoutError:
            self.send(signal.SIGKILL)
            return await self._process.wait()

    async def _spawn(self) -> None:
        # In a new session Ctrl-C in the terminal reaches only the gateway, which drains before it stops the child.
        self._process = await asyncio.create_subprocess_exec(
            *self.command, start_new_session=True, env=self._environment
        )

    async def _respawn(self) -> bool:
        """Start the child again. False if that fails: no memory, too many processes, or the file is missing."""
        try:
            await self._spawn()
        except OSError as error:
            log.warning("cannot start %s: %s", self.name, error.strerror)
            return False
        return True

    async def _watch(self) -> None:
        failures = 0
        while True:
            assert self._process is not None
            started = time.monotonic()
            code = await self._process.wait()
            if not self._keep(code):
                return
            failures = 0 if time.monotonic() - started > _STABLE_S else failures + 1
            delay = self._backoff_s[min(max(failures - 1, 0), len(self._backoff_s) - 1)]
            log.warning("%s exited with code %s; restarting it in %.1f s", self.name, code, delay)
            await asyncio.sleep(delay)
            while not await self._respawn():
                await asyncio.sleep(self._backoff_s[-1])
            self.restarts += 1
            self.on_restart()
