"""Reloads the configuration file while the gateway serves: on SIGHUP and on `POST /reload`."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from engine_adapter.asgi import cancel_and_wait
from gateway.app import Gateway
from gateway.config.file import ConfigError, Mistake, located
from gateway.config.schema import GatewayConfig
from gateway.engines import EngineConfigError

log = logging.getLogger("antares.reload")

SETTLE_S = 0.1
"""Seconds from the first signal to the reload, which later signals share: a storm causes few reloads. Convention."""


@dataclass(slots=True)
class Report:
    """What a reload did, for operators.

    Attributes:
        mistakes: why nothing changed; empty after success. ``file`` is where they are.
        changed: keys whose values changed and count now.
        needs_restart: keys whose values changed, but count only after a restart.
        starting: engines that were added and are not up yet.
        leaving: engines that finish their last requests.
    """

    file: str = ""
    mistakes: list[Mistake] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    needs_restart: list[str] = field(default_factory=list)
    starting: list[str] = field(default_factory=list)
    leaving: list[str] = field(default_factory=list)

    def document(self) -> dict[str, Any]:
        """Return the report as a JSON object."""
        return {"ok": not self.mistakes, **asdict(self)}


class Reloader:
    """Reloads the configuration of ``gateway`` with ``load``, one reload at a time.

    ``load`` reads the file. It raises `gateway.config.file.ConfigError`. ``on_begin`` and ``on_end`` are called around
    each reload.
    """

    def __init__(
        self,
        gateway: Gateway,
        load: Callable[[], GatewayConfig],
        *,
        file: Path | None = None,
        on_begin: Callable[[], None] = lambda: None,
        on_end: Callable[[Report], None] = lambda report: None,
    ) -> None:
        self.reloads = 0
        self._gateway = gateway
        self._load = load
        self._file = file
        self._on_begin, self._on_end = on_begin, on_end
        self._running = asyncio.Lock()
        self._next: asyncio.Task[Report] | None = None

    def request(self) -> asyncio.Task[Report]:
        """Return the task of the next reload. Requests that come before it reads the file share it."""
        if self._next is None:
            self._next = asyncio.create_task(self._reload(), name="reload")
        return self._next

    async def reload(self) -> dict[str, Any]:
        """Reload and return the report as a document."""
        return (await asyncio.shield(self.request())).document()

    async def stop(self) -> None:
        """End a reload that has not begun."""
        if self._next is not None:
            await cancel_and_wait(self._next)  # type: ignore[arg-type]

    async def _reload(self) -> Report:
        await self._gateway.can_reload.wait()
        await asyncio.sleep(SETTLE_S)
        async with self._running:
            self._next = None
            self._on_begin()
            report = await self._apply()
            self._on_end(report)
            return report

    async def _apply(self) -> Report:
        """Read the file and apply it. A file with mistakes changes nothing."""
        self.reloads += 1
        file = str(self._file or "")
        try:
            # In a thread, because a file with thousands of keys takes seconds and streams must go on.
            config = await asyncio.to_thread(self._load)
            try:
                change = await asyncio.to_thread(self._gateway.config.change_to, config)
                done = self._gateway.apply(change)
            except (ValidationError, EngineConfigError) as error:
                raise await asyncio.to_thread(located, self._file, _mistakes(error)) from error
        except ConfigError as error:
            for mistake in error.mistakes:
                log.error("nothing changed: %s: %s", error.path, mistake)
            return Report(str(error.path), error.mistakes)
        except Exception as error:
            log.error("nothing changed: %s", error, exc_info=error)
            return Report(file, [Mistake(1, "", f"{type(error).__name__}: {error}")])
        logging.getLogger("antares").setLevel(config.logging.level.upper())
        log.info("changed: %s", ", ".join(done.changed) or "nothing")
        if done.needs_restart:
            log.warning("needs a restart to take effect: %s", ", ".join(done.needs_restart))
        for caution in config.cautions():
            log.warning("%s", caution)
        return Report(file, [], done.changed, done.needs_restart, done.starting, done.leaving)


def _mistakes(error: ValidationError | EngineConfigError) -> list[tuple[str, str]]:
    """Return key and reason of each mistake."""
    if isinstance(error, EngineConfigError):
        return [(f"engines[{error.index}]", error.reason)]
    mistakes = []
    for detail in error.errors():
        key, _, reason = detail["msg"].removeprefix("Value error, ").partition(": ")
        mistakes.append((key, reason) if reason else ("", key))
    return mistakes
