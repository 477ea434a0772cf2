"""What a gateway process knows that `gateway.processes` started: one of several that share a port."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from gateway import sd_notify

log = logging.getLogger("antares.serve")

PARENT_EVERY_S = 1.0
"""Seconds between two checks whether the parent still runs. Convention."""


@dataclass(frozen=True, slots=True)
class Child:
    """One of the processes of a gateway. The parent hears it on ``NOTIFY_SOCKET``, as systemd would.

    Attributes:
        index: from 0.
        file: the configuration file.
        parent: process id of the parent.
        port: TCP port that all processes listen on.
        own_port: TCP port that only this process listens on, besides the shared one; 0 takes a free one.
        overrides: values of dotted keys of the configuration, such as ``shard.index``.
    """

    index: int
    file: str
    parent: int
    port: int
    own_port: int
    overrides: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, argument: str) -> Child:
        """Return the child that ``argument`` describes."""
        return cls(**json.loads(argument))

    def argument(self) -> str:
        """Return the child as a command-line argument."""
        return json.dumps(asdict(self))

    async def end_with_parent(self) -> None:
        """Drain and end once the parent is gone. Without it, nothing restarts this process or forwards signals."""
        while os.getppid() == self.parent:
            await asyncio.sleep(PARENT_EVERY_S)
        log.warning("the parent process is gone: stopping")
        os.kill(os.getpid(), signal.SIGTERM)

    def reloading_all(self, reload: Callable[[], Awaitable[dict[str, Any]]]) -> Callable[[], Awaitable[dict[str, Any]]]:
        """Return ``reload``, after which the other processes reload too, if it found no mistake."""

        async def reload_all() -> dict[str, Any]:
            document = await reload()
            if document["ok"]:
                sd_notify.notify(X_RELOADED=1)
            return document

        return reload_all
