"""Keeps a number of servers running in a Ray cluster, each in an actor with a placement group.

Ray restarts an actor whose server or node is lost, on another node if need be. The URLs of the servers that answer are
written to a file, which the gateway follows (`discover.file`).
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine_adapter.ray.server_process import ServerProcess

log = logging.getLogger("antares.ray")

ASK_TIMEOUT_S = 5.0
"""Seconds to wait for the answers of the actors to a probe. Longer than an actor waits for its server."""

LOST_PROBES, LOST_S = 3, 5.0
"""Failed probes in a row, and the seconds since the last answer, after which a server leaves the file. As in
`engine_adapter.remote.engine`: the gateway then ends the requests of a server that sends nothing."""

HUNG_S = 60.0
"""Seconds without an answer after which a server that has answered before is replaced. Convention: far longer than a
busy server needs to answer."""

START_S = 3600.0
"""Default of `Replicas.start_s`. A large model may load for 30 minutes; twice that."""


class Replica:
    """The actor: one server. Its process ends when the server does, so that Ray starts both again.

    ``host``: address to listen on; None for that of the actor's node.
    """

    def __init__(self, command: Sequence[str], host: str | None) -> None:
        import ray

        self._server = ServerProcess(command, host or ray.util.get_node_ip_address())

    def probe(self) -> tuple[str, int | None, bool]:
        """Return the server's URL, the port of its report channel, if chosen, and whether the server answers."""
        if self._server.exit_code is not None:
            # Not an exception, which would leave the actor alive.
            os._exit(1)
        return self._server.url, self._server.report_port, self._server.is_healthy()

    def stop(self, drain_s: float) -> int:
        """Stop the server, which has ``drain_s`` to finish its requests. Returns its exit code."""
        return self._server.stop(drain_s)


@dataclass(slots=True)
class _Slot:
    """One replica: its placement group, its actor and its server.

    ``url``: of the server, whether it answers or not; "" until the actor runs. A new server has another URL.
    ``report_port``: of the server's report channel, if it was chosen for this server.
    ``has_served``: the server has answered since it was started, so it may have requests even while it does not answer.
    ``answered_at``: when the server answered last; before its first answer, when it was first seen.
    ``failed_probes``: probes without an answer since then.
    """

    group: Any
    actor: Any
    url: str = ""
    report_port: int | None = None
    has_served: bool = False
    answered_at: float = 0.0
    failed_probes: int = 0

    def note(self, now: float, url: str, report_port: int | None, is_healthy: bool) -> None:
        """Take in an answer of the actor to a probe."""
        is_new = url != self.url
        self.url, self.report_port = url, report_port
        self.has_served = is_healthy or (self.has_served and not is_new)
        self.failed_probes = 0 if is_healthy else self.failed_probes + 1
        if is_healthy or is_new:
            self.answered_at = now

    def silent_s(self, now: float) -> float:
        """Return the seconds since the server's last answer; 0 while fewer than `LOST_PROBES` probes have failed."""
        return now - self.answered_at if self.failed_probes >= LOST_PROBES else 0.0


@dataclass(slots=True)
class Replicas:
    """Runs ``count`` servers in a Ray cluster: call `start` once, then `refresh` about every second.

    A server leaves the file when its actor has another one, or when it is silent for `LOST_S`. It is replaced when it
    is silent for `HUNG_S`, or for ``start_s`` if it has never answered.

    Attributes:
        command: starts one server; ``{host}`` and ``{port}`` stand for its address.
        count: number of servers.
        bundle: Ray resources that each server reserves, such as ``{"CPU": 1, "GPU": 1}``.
        file: JSON file that `refresh` writes the URLs to. Only its owner can read it.
        host: address that the servers listen on; None for that of their node.
        start_s: seconds that a server has from its start to its first answer. Waiting for resources does not count.
        clock: returns the time in seconds.
    """

    command: Sequence[str]
    count: int
    bundle: Mapping[str, float]
    file: Path
    host: str | None = None
    start_s: float = START_S
    clock: Callable[[], float] = time.monotonic
    _slots: list[_Slot] = field(default_factory=list)
    _written: list[Any] | None = None

    def start(self) -> None:
        """Start the actors. Those for which the cluster has no room wait for it."""
        self._slots = [self._new_slot() for _ in range(self.count)]

    def refresh(self) -> list[str]:
        """Probe the servers, replace lost and hung ones, and write the file. Returns the URLs in it."""
        asked = [slot.actor.probe.remote() for slot in self._slots]
        until = self.clock() + ASK_TIMEOUT_S
        for index, (slot, answer) in enumerate(zip(self._slots, asked, strict=True)):
            reason = self._why_replace(slot, answer, until)
            if reason:
                log.error("replica %d is replaced: %s", index, reason)
                _remove(slot)
                self._slots[index] = self._new_slot()
        now = self.clock()
        listed = [slot for slot in self._slots if slot.has_served and slot.silent_s(now) < LOST_S]
        self._write([_entry(slot.url, slot.report_port) for slot in listed])
        return [slot.url for slot in listed]

    def stop(self, drain_s: float) -> list[int]:
        """Stop all servers at once; each has ``drain_s`` (s) to finish its requests. Returns the exit codes.

        Servers that never answered have no requests, and are killed.
        """
        import ray
        from ray.exceptions import RayError

        stopping = [slot.actor.stop.remote(drain_s) for slot in self._slots if slot.has_served]
        codes = []
        until = self.clock() + drain_s + ASK_TIMEOUT_S
        for answer in stopping:
            try:
                codes.append(ray.get(answer, timeout=max(0.0, until - self.clock())))
            except RayError as error:
                log.error("a replica did not stop cleanly: %s", error)
        for slot in self._slots:
            _remove(slot)
        self._slots = []
        return codes

    def _why_replace(self, slot: _Slot, answer: Any, until: float) -> str:
        """Wait for the actor's answer to a probe. Returns why it must be replaced; "" if it need not be."""
        import ray
        from ray.exceptions import ActorDiedError, GetTimeoutError, RayError

        try:
            slot.note(self.clock(), *ray.get(answer, timeout=max(0.0, until - self.clock())))
        except ActorDiedError as error:
            return f"its actor is lost: {error}"
        except RayError as error:
            # The actor waits for resources, hangs, or is started again by Ray; or its node cannot be reached.
            slot.failed_probes += 1
            if isinstance(error, GetTimeoutError):
                ray.cancel(answer)
        silent_s = slot.silent_s(self.clock())
        if not slot.url or silent_s < (HUNG_S if slot.has_served else self.start_s):
            return ""
        return f"{slot.url} has not answered for {silent_s:.0f} s"

    def _new_slot(self) -> _Slot:
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        group = ray.util.placement_group([dict(self.bundle)], strategy="STRICT_PACK")
        strategy = PlacementGroupSchedulingStrategy(placement_group=group)
        needs = {"num_cpus": self.bundle.get("CPU", 0), "num_gpus": self.bundle.get("GPU", 0)}
        others = {name: amount for name, amount in self.bundle.items() if name not in {"CPU", "GPU"}}
        actor = ray.remote(Replica).options(scheduling_strategy=strategy, max_restarts=-1, resources=others, **needs)
        return _Slot(group, actor.remote(list(self.command), self.host))

    def _write(self, entries: list[Any]) -> None:
        """Replace the file. Raises OSError."""
        if entries == self._written:
            return
        # A reader sees the old file or the new one. `mkstemp` gives the file mode 0600 and follows no link.
        descriptor, new = tempfile.mkstemp(prefix=f".{self.file.name}.", dir=self.file.parent)
        try:
            with os.fdopen(descriptor, "w") as file:
                json.dump({"engines": entries}, file)
            Path(new).replace(self.file)
        except OSError:
            Path(new).unlink(missing_ok=True)
            raise
        self._written = entries
        log.info("%d of %d servers answer: %s", len(entries), self.count, entries)


def _remove(slot: _Slot) -> None:
    """Kill the actor, and with it its server, and free its resources."""
    import ray

    ray.kill(slot.actor)
    ray.util.remove_placement_group(slot.group)


def _entry(url: str, report_port: int | None) -> Any:
    """Return the server's entry in the file: its URL, or an object with the port of its report channel too."""
    return url if report_port is None else {"url": url, "report_port": report_port}
