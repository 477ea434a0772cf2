"""Reloads the configuration while the gateway serves: on SIGHUP and on `POST /reload`.

The keys file is also read when it changes.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from engine_adapter.asgi import cancel_and_wait
from gateway.app import Access, Gateway, Reloaded
from gateway.config.file import located
from gateway.config.keys_file import keys_path, read_keys
from gateway.config.mistakes import ConfigError, Mistake, mistake_of
from gateway.config.schema import GatewayConfig
from gateway.engines import EngineConfigError
from gateway.observability.recorder import ObservabilityError

log = logging.getLogger("antares.reload")

SETTLE_S = 0.1
"""Seconds from the first signal to the reload, which later signals share: a storm causes few reloads. Convention."""

KEYS_EVERY_S = 1.0
"""Seconds between two checks whether the keys file has changed. Convention: a revoked key works at most this long."""


@dataclass(slots=True)
class Report:
    """What an attempt to reload ``file`` did, for operators. ``mistakes``: why nothing changed; empty after success."""

    file: str
    mistakes: list[Mistake] = field(default_factory=list)
    reloaded: Reloaded = field(default_factory=Reloaded)

    def document(self) -> dict[str, Any]:
        """Return the report as a JSON object."""
        mistakes = [asdict(mistake) for mistake in self.mistakes]
        return {"ok": not mistakes, "file": self.file, "mistakes": mistakes, **asdict(self.reloaded)}


class Reloader:
    """Reloads the configuration of ``gateway`` with ``load``, one reload at a time.

    ``load`` reads the file. It raises `gateway.config.mistakes.ConfigError`. ``on_begin`` and ``on_end`` are called
    around each reload.
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
        self._watching: asyncio.Task[None] | None = None

    def watch_keys(self) -> None:
        """Apply the keys file whenever it changes, until `stop`."""
        self._watching = asyncio.create_task(self._watch_keys(), name="watch keys file")

    def request(self) -> asyncio.Task[Report]:
        """Return the task of the next reload. Requests that come before it reads the file share it."""
        if self._next is None:
            self._next = asyncio.create_task(self._reload(), name="reload")
        return self._next

    async def reload(self) -> dict[str, Any]:
        """Reload and return the report as a document."""
        return (await asyncio.shield(self.request())).document()

    async def stop(self) -> None:
        """End a reload that has not begun, and `watch_keys`."""
        if self._watching is not None:
            await cancel_and_wait(self._watching)
        if self._next is not None:
            await cancel_and_wait(self._next)  # type: ignore[arg-type]

    async def _watch_keys(self) -> None:
        seen: object = None
        while True:
            # A reload may name another file.
            async with self._running:
                keys_file = self._gateway.config.keys_file
                if keys_file is not None:
                    path = keys_path(keys_file.path, self._file)
                    # In a thread, because the folder may be on another machine.
                    version = await asyncio.to_thread(_version, path)
                    if version != seen:
                        await self._apply_keys(path)
                        seen = version
            await asyncio.sleep(KEYS_EVERY_S)

    async def _apply_keys(self, path: Path) -> None:
        """Read the keys file and apply it. A file with mistakes changes nothing."""
        config = self._gateway.config
        try:
            entries = await asyncio.to_thread(read_keys, path)
            try:
                change = await asyncio.to_thread(config.with_keys, entries)
            except ValidationError as error:
                raise await asyncio.to_thread(self._located, error) from error
            if change.keys:
                self._gateway.apply(change, await asyncio.to_thread(Access.of, change.config))
                log.info("%s: %d keys are valid now", path, len(entries))
        except ConfigError as error:
            _log_mistakes(error)
        except Exception as error:
            log.error("nothing changed: %s: %s", path, error, exc_info=error)

    def _located(self, error: ValidationError | EngineConfigError | ObservabilityError) -> ConfigError:
        keys_file = self._gateway.config.keys_file
        return located(self._file, _mistakes(error), None if keys_file is None else keys_file.path)

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
                done = self._gateway.apply(change, await asyncio.to_thread(Access.of, change.config))
            except (ValidationError, EngineConfigError, ObservabilityError) as error:
                raise await asyncio.to_thread(self._located, error) from error
        except ConfigError as error:
            _log_mistakes(error)
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
        return Report(file, reloaded=done)


def _version(path: Path) -> object:
    """Return what changes when the file at ``path`` does; None if there is none."""
    try:
        state = path.stat()
    except OSError:
        return None
    # The last one also changes with the rights of the file.
    return state.st_mtime_ns, state.st_size, state.st_ino, state.st_ctime_ns


def _log_mistakes(error: ConfigError) -> None:
    for mistake in error.mistakes:
        log.error("nothing changed: %s: %s", error.path, mistake)


def _mistakes(error: ValidationError | EngineConfigError | ObservabilityError) -> list[tuple[str, str]]:
    """Return key and reason of each mistake."""
    if isinstance(error, EngineConfigError):
        return [(f"engines[{error.index}]", error.reason)]
    if isinstance(error, ObservabilityError):
        key, _, reason = str(error).partition(": ")
        return [(key, reason)]
    found = [mistake_of(detail, None) for detail in error.errors()]
    return [(mistake.key, mistake.reason) for mistake in found]
