"""`antares serve` with ``server.processes``: starts them, restarts what dies or hangs, and forwards signals.

Each process is a whole gateway with a share of the engines (`gateway.scheduling.shards`). All of them listen on one
port, and the kernel gives each new connection to one of them. Each also listens on a port of its own, for its metrics:
the shared one plus 1, 2, and so on. The parent serves nothing; it runs the predictor that they share.

INVARIANT: the loss of a process costs only the requests that it had open. Its port and its engines stay its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from gateway import sd_notify
from gateway.child import Child
from gateway.config.schema import GatewayConfig
from gateway.config.shard import MAX_SHARDS
from gateway.listening import ServeError, listen, url
from gateway.predictor_process import supervised_predictor
from gateway.scheduling.shards import Shard
from gateway.supervisor import Supervisor

log = logging.getLogger("antares.processes")
console = Console(stderr=True, highlight=False)

READY, STARTING = "ready", "it is starting"

HANG_S = 30.0
"""Seconds without a sign of life after which a process is killed and started again. It gives one each half of them."""

CHECKS = 10
"""Times that the parent looks for a sign of life in `HANG_S`. It counts them, not the seconds: while the whole machine
or container is paused, nothing gives a sign of life."""

START_CHECKS = 10 * CHECKS
"""The same until the first sign of life: a cold disk and many processes make a start slow. Convention."""


class Process:
    """One of the processes, as the parent sees it.

    ``on_change`` is called when it says something new, ``on_reload`` when it has read the configuration again because a
    client asked it to.

    Attributes:
        own_port: the port that only it listens on.
        status: why it is not ready; if it is, it begins with `READY`.
        serves: it has begun to serve.
        up: it serves, with the configuration that counts now.
        failed: whether it ended before it ever served.
    """

    def __init__(
        self, child: Child, folder: Path, on_change: Callable[[], None], on_reload: Callable[[Process], None]
    ) -> None:
        self.index, self.own_port = child.index, child.own_port
        self.status, self.up, self.failed = STARTING, False, False
        self._on_change, self._on_reload, self._checks_left = on_change, on_reload, START_CHECKS
        self.serves = self._was_up = self._must_reload = False
        path = folder / f"{child.index}.sock"
        self._mailbox = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._mailbox.bind(str(path))
        asyncio.get_running_loop().add_reader(self._mailbox, self._read)
        environment = {name: value for name, value in os.environ.items() if name != "WATCHDOG_PID"}
        self._supervisor = Supervisor(
            f"process {child.index}",
            [sys.executable, "-P", "-m", "gateway.processes", child.argument()],
            on_restart=self._on_restart,
            environment=environment | {"NOTIFY_SOCKET": str(path), "WATCHDOG_USEC": str(int(HANG_S * 1e6))},
            keep=self._keep,
        )

    async def start(self) -> None:
        """Start the process, and the task that restarts it."""
        await self._supervisor.start()

    async def stop(self) -> int:
        """Have the process drain and end. Returns its exit code."""
        # Only the process knows how long it may drain: a reload can change that. If it hangs, `check` kills it.
        code = await self._supervisor.stop(None)
        asyncio.get_running_loop().remove_reader(self._mailbox)
        self._mailbox.close()
        if code is None or code == -signal.SIGTERM:
            # It did not run, or had not begun to serve: then it has no handler of the signal.
            return 0
        return code if code >= 0 else 1

    def send(self, number: signal.Signals) -> None:
        """Send a signal, if the process runs."""
        self._supervisor.send(number)

    @property
    def pid(self) -> int | None:
        """Its process id, or None while it does not run."""
        return self._supervisor.pid

    @property
    def is_ready(self) -> bool:
        """Whether it can serve requests."""
        return self.status.startswith(READY)

    def reload(self) -> None:
        """Have the process read the configuration file again, once it serves: before that the signal would end it."""
        self.up, self._must_reload = False, not self.serves
        if self.serves:
            self.send(signal.SIGHUP)

    def check(self) -> None:
        """Kill the process if it has given no sign of life since the last `CHECKS` calls."""
        self._checks_left -= 1
        if self._checks_left == 0 and self.pid is not None:
            log.error("process %d hangs: killing it", self.index)
            self.send(signal.SIGKILL)

    def _keep(self, code: int) -> bool:
        """Return whether to start the process again, which ended with ``code``: not if it has never started."""
        self.up = self.serves = False
        self.status = f"it ended with code {code}"
        self.failed = not self._was_up
        self._on_change()
        return self._was_up

    def _on_restart(self) -> None:
        self.status, self._checks_left = STARTING, START_CHECKS

    def _read(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                self._hear(self._mailbox.recv(4096).decode(errors="replace"))

    def _hear(self, message: str) -> None:
        said = dict(line.partition("=")[::2] for line in message.splitlines())
        self._checks_left = CHECKS
        if "X_OWN_PORT" in said:
            self.own_port = int(said["X_OWN_PORT"])
        if "READY" in said:
            self.up = self.serves = self._was_up = True
            if self._must_reload:
                self.reload()
        if "RELOADING" in said:
            self.up = False
        self.status = said.get("STATUS", self.status)
        if "X_RELOADED" in said:
            self._on_reload(self)
        if said.keys() & {"READY", "RELOADING", "STATUS"}:
            self._on_change()


class Parent:
    """Starts the processes of the gateway of ``file``, and says how they are.

    ``overrides``: values of dotted keys for all of them. ``shard``: that of this gateway, of several.

    Attributes:
        processes: empty before `run`.
    """

    def __init__(self, file: Path, config: GatewayConfig, overrides: Mapping[str, Any], shard: Shard) -> None:
        self._file, self._config, self._overrides, self._shard = file, config, overrides, shard
        self.processes: list[Process] = []
        self._started, self._printed_ready, self._ending = time.monotonic(), False, asyncio.Event()
        self._told: dict[Process, str] = {}

    async def run(self, port: int, folder: Path) -> int:
        """Run the processes on ``port`` until `end` is called. Returns the highest exit code.

        ``folder``: for their sockets to the parent. Raises `ServeError` if one of them does not start.
        """
        watching = asyncio.create_task(self._check_all(), name="watch processes")
        try:
            for index in range(self._config.server.processes):
                child = self._child(index, port)
                self.processes.append(Process(child, folder, partial(self._tell, port), self._reload_all_but))
            for process in self.processes:
                await process.start()
            await self._ending.wait()
        except OSError as error:
            # No memory, too many processes, or too long a path of the socket.
            raise ServeError(f"cannot start {self._config.server.processes} processes: {error}") from error
        finally:
            self._ending.set()
            sd_notify.notify(STOPPING=1, STATUS="draining")
            codes = await asyncio.gather(*(process.stop() for process in self.processes))
            watching.cancel()
        for process in self.processes:
            if process.failed:
                raise ServeError(f"process {process.index} did not start; the lines above say why")
        return max(codes)

    def end(self) -> None:
        """Have all processes drain and end. Called again, have them not wait for open requests."""
        if self._ending.is_set():
            log.warning("another signal: not waiting for open requests")
            # A second SIGTERM would mean nothing to them.
            self.send(signal.SIGINT)
        self._ending.set()

    def send(self, number: signal.Signals) -> None:
        """Send a signal to all processes."""
        for process in self.processes:
            process.send(number)

    def reload(self) -> None:
        """Have all processes read the configuration file again."""
        sd_notify.reloading()
        for process in self.processes:
            process.reload()

    def on_predictor_restart(self) -> None:
        """Have the first process count it, since the parent has no metrics."""
        # A process that ends may have no handler any more, and would die of the signal.
        if not self._ending.is_set() and self.processes and self.processes[0].serves:
            self.processes[0].send(signal.SIGUSR2)

    def _reload_all_but(self, done: Process) -> None:
        for process in self.processes:
            if process is not done:
                process.reload()

    def _child(self, index: int, port: int) -> Child:
        count = self._config.server.processes
        overrides = {
            "shard.count": self._shard.count * count,
            "shard.index": self._shard.index * count + index,
        }
        own_port = port + 1 + index if self._config.server.port else 0
        return Child(index, str(self._file), os.getpid(), port, own_port, {**self._overrides, **overrides})

    async def _check_all(self) -> None:
        while True:
            await asyncio.sleep(HANG_S / CHECKS)
            for process in self.processes:
                process.check()

    def _tell(self, port: int) -> None:
        """Tell systemd how the processes are, and print what is new."""
        if any(process.failed for process in self.processes):
            self._ending.set()
        if self._ending.is_set():
            return
        down = next((process for process in self.processes if not process.is_ready), None)
        ready = {"READY": 1} if all(process.up for process in self.processes) else {}
        sd_notify.notify(**ready, STATUS=READY if down is None else f"process {down.index}: {down.status}")
        for process in self.processes:
            if process.status in (STARTING, self._told.get(process)):
                continue
            self._told[process] = process.status
            if not process.is_ready:
                log.warning("process %d: %s", process.index, process.status)
            elif self._printed_ready:
                log.info("process %d: %s", process.index, process.status)
        if down is None and not self._printed_ready:
            self._printed_ready = True
            self._print_ready(port)

    def _print_ready(self, port: int) -> None:
        host = self._config.server.host
        metrics = "  ".join(f"{url(host, process.own_port)}/metrics" for process in self.processes)
        console.print(
            f"[bold green]Antares is ready[/bold green] at {url(host, port)} after "
            f"{time.monotonic() - self._started:.0f} s, {len(self.processes)} processes. Ctrl-C stops it.\n\n"
            f"  metrics of each process  {metrics}\n",
            soft_wrap=True,
        )


async def serve_all(file: Path, config: GatewayConfig, overrides: Mapping[str, Any]) -> int:
    """Serve with several processes until SIGINT or SIGTERM, then have them drain. Returns the highest exit code.

    ``overrides``: values of dotted keys that replace those of ``file``. Raises `ServeError` if one does not start.
    """
    shard = _shard(config)
    async with contextlib.AsyncExitStack() as stack:
        port = _reserve(config.server.host, config.server.port, stack)
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="antares-", ignore_cleanup_errors=True))
        supervisor, predictor_url = supervised_predictor(config, stack)
        shared = {} if predictor_url is None else {"predictor.url": predictor_url}
        parent = Parent(file, config, {**overrides, **shared}, shard)
        _on_signals(parent)
        if supervisor is not None:
            supervisor.on_restart = parent.on_predictor_restart
            await supervisor.start()
            stack.push_async_callback(supervisor.stop)
        beating = asyncio.create_task(sd_notify.keep_watchdog(), name="watchdog")
        stack.callback(beating.cancel)
        return await parent.run(port, Path(folder))


def _shard(config: GatewayConfig) -> Shard:
    try:
        shard = config.shard.shard()
    except ValueError as error:
        raise ServeError(str(error)) from error
    if shard.count * config.server.processes > MAX_SHARDS:
        raise ServeError(
            f"shard.count times server.processes is {shard.count * config.server.processes}, and at most "
            f"{MAX_SHARDS} processes divide the engines; lower one of them"
        )
    return shard


def _reserve(host: str, port: int, stack: contextlib.AsyncExitStack) -> int:
    """Return a port that the processes can share until ``stack`` ends. Raises `ServeError` if it is taken."""
    # Without sharing first: otherwise another gateway that shares the same port would not be noticed.
    with listen(host, port) as alone:
        port = alone.getsockname()[1]
    # It does not listen, so it gets no connection.
    stack.callback(listen(host, port, shared=True).close)
    return port


def _on_signals(parent: Parent) -> None:
    """End on SIGINT and SIGTERM, and reload on SIGHUP."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, parent.end)
    loop.add_signal_handler(signal.SIGHUP, parent.reload)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
