"""Keeps a number of servers running in a Ray cluster, each in an actor with a placement group.

Ray restarts an actor whose server or node is lost, on another node if need be. The URLs of the servers that answer are
written to a file, which the gateway follows (`discover.file`).
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine_adapter.ray.server_process import ServerProcess

log = logging.getLogger("antares.ray")

ASK_TIMEOUT_S = 5.0
"""Seconds to wait for the actors. One that does not answer keeps its URL until Ray says that it is lost."""


class Replica:
    """The actor: one server. Its process ends when the server does, so that Ray starts both again."""

    def __init__(self, command: Sequence[str]) -> None:
        import ray

        self._server = ServerProcess(command, ray.util.get_node_ip_address())

    def address(self) -> tuple[str, int | None]:
        """Return the URL of the server once it answers, "" before, and the port of its report channel, if chosen."""
        if self._server.exit_code is not None:
            # Not an exception, which would leave the actor alive.
            os._exit(1)
        return self._server.url if self._server.is_healthy() else "", self._server.report_port

    def stop(self, drain_s: float) -> int:
        """Stop the server, which has ``drain_s`` to finish its requests. Returns its exit code."""
        return self._server.stop(drain_s)


@dataclass(slots=True)
class _Slot:
    """One replica: its placement group, its actor, and its server's URL, "" while the server does not answer.

    ``report_port``: of the server's report channel, if it was chosen for this server.
    ``has_served``: the server has answered since it was started, so it may have requests even while it is too busy to
    answer.
    """

    group: Any
    actor: Any
    url: str = ""
    report_port: int | None = None
    has_served: bool = False


@dataclass(slots=True)
class Replicas:
    """Runs ``count`` servers in a Ray cluster: call `start` once, then `refresh` about every second.

    Attributes:
        command: starts one server; ``{host}`` and ``{port}`` stand for its address.
        count: number of servers.
        bundle: Ray resources that each server reserves, such as ``{"CPU": 1, "GPU": 1}``.
        file: JSON file that `refresh` writes the URLs to.
    """

    command: Sequence[str]
    count: int
    bundle: Mapping[str, float]
    file: Path
    _slots: list[_Slot] = field(default_factory=list)
    _written: list[Any] | None = None

    def start(self) -> None:
        """Start the actors. Those for which the cluster has no room wait for it."""
        self._slots = [self._new_slot() for _ in range(self.count)]

    def refresh(self) -> list[str]:
        """Ask each actor for its URL, replace actors that Ray gave up, and write the file. Returns the URLs."""
        import ray
        from ray.exceptions import ActorDiedError, GetTimeoutError, RayActorError

        asked = [slot.actor.address.remote() for slot in self._slots]
        until = time.monotonic() + ASK_TIMEOUT_S
        for index, (slot, answer) in enumerate(zip(self._slots, asked, strict=True)):
            try:
                url, slot.report_port = ray.get(answer, timeout=max(0.0, until - time.monotonic()))
            except GetTimeoutError:
                ray.cancel(answer)
                continue
            except ActorDiedError as error:
                log.error("replica %d is lost and is started again: %s", index, error)
                ray.util.remove_placement_group(slot.group)
                self._slots[index] = self._new_slot()
                continue
            except RayActorError:
                # Ray restarts it.
                url, slot.has_served = "", False
            if url != slot.url:
                log.info("replica %d: %s", index, url or f"{slot.url} is lost")
            slot.url, slot.has_served = url, slot.has_served or bool(url)
        serving = [slot for slot in self._slots if slot.url]
        self._write([_entry(slot.url, slot.report_port) for slot in serving])
        return [slot.url for slot in serving]

    def stop(self, drain_s: float) -> list[int]:
        """Stop all servers at once; each has ``drain_s`` (s) to finish its requests. Returns the exit codes.

        Servers that never answered have no requests, and are killed.
        """
        import ray
        from ray.exceptions import GetTimeoutError, RayActorError

        stopping = [slot.actor.stop.remote(drain_s) for slot in self._slots if slot.has_served]
        codes = []
        until = time.monotonic() + drain_s + ASK_TIMEOUT_S
        for answer in stopping:
            try:
                codes.append(ray.get(answer, timeout=max(0.0, until - time.monotonic())))
            except (RayActorError, GetTimeoutError) as error:
                log.error("a replica did not stop cleanly: %s", error)
        for slot in self._slots:
            ray.kill(slot.actor)
            ray.util.remove_placement_group(slot.group)
        self._slots = []
        return codes

    def _new_slot(self) -> _Slot:
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        group = ray.util.placement_group([dict(self.bundle)], strategy="STRICT_PACK")
        strategy = PlacementGroupSchedulingStrategy(placement_group=group)
        needs = {"num_cpus": self.bundle.get("CPU", 0), "num_gpus": self.bundle.get("GPU", 0)}
        others = {name: amount for name, amount in self.bundle.items() if name not in {"CPU", "GPU"}}
        actor = ray.remote(Replica).options(scheduling_strategy=strategy, max_restarts=-1, resources=others, **needs)
        return _Slot(group, actor.remote(list(self.command)))

    def _write(self, entries: list[Any]) -> None:
        if entries == self._written:
            return
        # A reader sees the old file or the new one.
        new = self.file.with_name(f".{self.file.name}.new")
        new.write_text(json.dumps({"engines": entries}))
        new.replace(self.file)
        self._written = entries


def _entry(url: str, report_port: int | None) -> Any:
    """Return the server's entry in the file: its URL, or an object with the port of its report channel too."""
    return url if report_port is None else {"url": url, "report_port": report_port}
