"""Adds and removes engines while the gateway serves, so that a reload of the configuration drops no request.

A new engine starts in the background and joins the router once it is up. Then the engines that the new configuration
does not have leave: they get no new requests, finish what they have within the drain time, and stop. A changed engine
is a new one that takes the place of the old one. Two in-process vLLM engines may not fit into the machine, so there the
old one leaves first.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from engine_adapter.asgi import cancel_and_wait
from engine_adapter.build import BUILDERS
from engine_adapter.engine import Engine, EngineEvents, EngineStartError
from gateway.config.engines import EngineConfig, HttpEngineConfig
from gateway.scheduling.engine_queue import EngineQueue
from gateway.scheduling.router import Router

log = logging.getLogger("antares.engines")

START_AGAIN_S = (1.0, 5.0, 15.0, 60.0)
"""Seconds before each further attempt to start an engine; the last value repeats. Convention."""

Build = Callable[[EngineConfig], Engine]

Expand = Callable[[Sequence[EngineConfig]], Sequence[Sequence[EngineConfig]]]
"""Returns the gateway's engines that each section of the configuration stands for (`gateway.discovery`)."""


def one_each(sections: Sequence[EngineConfig]) -> Sequence[Sequence[EngineConfig]]:
    """Return ``sections`` as engines: each is one."""
    return [[section] for section in sections]


def build_engine(config: EngineConfig) -> Engine:
    """Return the engine of a configuration section, not started.

    Raises `EngineStartError` or ValueError if it does not fit this machine, such as a variable that is not set.
    """
    options = config.model_dump(exclude={"kind", "step_times", "discover"})
    if config.step_times is not None:
        options["step_times"] = config.step_times.times()
    return BUILDERS[config.kind](**options)


class EngineConfigError(Exception):
    """An engine of the configuration cannot be built. ``index`` is its place in the list."""

    def __init__(self, index: int, reason: str) -> None:
        self.index, self.reason = index, reason
        super().__init__(f"engines[{index}]: {reason}")


@dataclass(slots=True, eq=False)
class _Member:
    """An engine that serves, starts or leaves. ``config``: its section, None if the gateway was given the engine."""

    config: EngineConfig | None
    queue: EngineQueue
    joined: bool = False
    task: asyncio.Task[None] | None = None
    stopped: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def name(self) -> str:
        return self.queue.engine.name

    @property
    def kind(self) -> str:
        return "" if self.config is None else self.config.kind


class Engines:
    """The engines of a gateway, which `change` adapts to a new configuration.

    Args:
        router: gets the engines that serve.
        configs: the sections of the engines that ``router`` has.
        make_queue: returns the queue for a new engine.
        events_of: returns what the engine of a queue reports to.
        build: returns the engine of a section (`build_engine`).
        expand: returns the engines of each section; by default the section itself.

    ``drain_s``: time (s) that requests have to finish on an engine that leaves.
    """

    def __init__(
        self,
        router: Router,
        configs: Sequence[EngineConfig],
        make_queue: Callable[[Engine], EngineQueue],
        events_of: Callable[[EngineQueue], EngineEvents],
        build: Build = build_engine,
        expand: Expand = one_each,
    ) -> None:
        self.drain_s = 30.0
        self._router = router
        self._make_queue = make_queue
        self._events_of = events_of
        self._build = build
        self._expand = expand
        self._wanted = self._expanded(configs)
        by_name = {config.name: config for config in self._wanted}
        self._members = [_Member(by_name.get(q.engine.name), q, joined=True) for q in router.engine_queues]
        self._leaving: list[_Member] = []

    @property
    def queues(self) -> list[EngineQueue]:
        """The queues of all engines that serve, start or leave."""
        return [member.queue for member in (*self._members, *self._leaving)]

    @property
    def starting(self) -> list[str]:
        """Names of the engines that are not up yet since they were added."""
        return [m.name for m in self._members if not m.joined or (m.task is not None and not m.task.done())]

    @property
    def unjoined(self) -> list[EngineQueue]:
        """The queues of the engines that have not served yet. One may have the name of an engine that serves."""
        return [member.queue for member in self._members if not member.joined]

    @property
    def leaving(self) -> list[str]:
        """Names of the engines that finish their last requests."""
        return [member.name for member in self._leaving]

    def build_new(self, configs: Sequence[EngineConfig]) -> dict[str, Engine]:
        """Return the engines of ``configs`` that are new or changed, by name, not started.

        Raises `EngineConfigError` for one that cannot be built.
        """
        present = [member.config for member in self._members]
        new = {}
        for index, engines in enumerate(self._expand(configs)):
            for config in engines:
                if config not in present:
                    try:
                        new[config.name] = self._build(config)
                    except (EngineStartError, ValueError) as error:
                        raise EngineConfigError(index, str(error)) from error
        return new

    def _expanded(self, configs: Sequence[EngineConfig]) -> list[EngineConfig]:
        return [config for engines in self._expand(configs) for config in engines]

    def change(self, configs: Sequence[EngineConfig], new: dict[str, Engine]) -> None:
        """Adapt the engines to ``configs``, in the background. ``new`` are those of `build_new` for ``configs``."""
        self._wanted = self._expanded(configs)
        for member in [m for m in self._members if not m.joined and m.config not in self._wanted]:
            self._leave(member)
        for config in self._wanted:
            if config.name in new:
                self._add(_Member(config, self._make_queue(new[config.name])))
        self._settle()

    async def stop(self) -> None:
        """Stop every engine. Their queues answer with `Draining`. Idempotent."""
        members = [*self._members, *self._leaving]
        await cancel_and_wait(*(member.task for member in members if member.task is not None))
        for member in members:
            member.queue.retired = False
            member.queue.close()
        await asyncio.gather(*(member.queue.engine.stop() for member in members), return_exceptions=True)

    # --- one engine -----------------------------------------------------------------------------------------------

    def _add(self, member: _Member) -> None:
        unwanted = [m for m in self._members if m.config not in self._wanted]
        blocking = [m for m in (*unwanted, *self._leaving) if _excludes(m, member)]
        self._members.append(member)
        if blocking:
            # It waits for the memory of the old ones, but its model must have an engine all the time.
            replaced = next((m for m in blocking if m.joined and m in self._members), None)
            self._join(member, replaced)
            for other in blocking:
                if other in self._members:
                    self._leave(other)
        log.info("engine %s starts", member.name)
        member.task = asyncio.create_task(self._start(member, blocking), name=f"start {member.name}")

    async def _start(self, member: _Member, blocking: Sequence[_Member]) -> None:
        """Start the engine, again and again until it starts."""
        for other in blocking:
            await other.stopped.wait()
        attempt = 0
        while True:
            queue = member.queue
            try:
                await queue.engine.start(self._events(member))
                return
            except Exception as error:
                queue.engine.state.why_down = f"it does not start: {error}"
                pause_s = START_AGAIN_S[min(attempt, len(START_AGAIN_S) - 1)]
                log.error("engine %s does not start, next attempt in %.0f s: %s", member.name, pause_s, error)
            attempt += 1
            await queue.engine.stop()
            await asyncio.sleep(pause_s)
            if not member.joined and member.config is not None:
                # An engine that was stopped may not start again.
                member.queue = self._make_queue(self._build(member.config))

    def _events(self, member: _Member) -> EngineEvents:
        events = self._events_of(member.queue)
        inform = events.on_alive

        def on_alive(alive: bool) -> None:
            inform(alive)
            if alive and not member.joined and member in self._members:
                same_name = (m for m in self._members if m.name == member.name and m is not member)
                self._join(member, next(same_name, None))
                self._settle()

        events.on_alive = on_alive
        return events

    def _join(self, member: _Member, replaced: _Member | None) -> None:
        member.joined = True
        self._router.join(member.queue, None if replaced is None else replaced.queue)
        if replaced is not None:
            replaced.joined = False
            self._leave(replaced)

    def _settle(self) -> None:
        """Have the engines leave that are no longer configured, once every configured one has joined.

        One whose address has disappeared stops soon, so it leaves as soon as another server of its host is up.
        """
        wanted = [member for member in self._members if member.config in self._wanted]
        for member in [m for m in self._members if m.config not in self._wanted]:
            if all(m.joined for m in wanted) or any(_stands_in(m, member) for m in wanted):
                self._leave(member)
        # The first engine has the default model.
        place = {config.name: index for index, config in enumerate(self._wanted)}
        self._router.engine_queues.sort(key=lambda queue: place.get(queue.engine.name, len(place)))

    def _leave(self, member: _Member) -> None:
        self._members.remove(member)
        self._leaving.append(member)
        if member.joined:
            self._router.leave(member.queue)
        starting = member.task
        member.task = asyncio.create_task(self._retire(member, starting), name=f"retire {member.name}")

    async def _retire(self, member: _Member, starting: asyncio.Task[None] | None) -> None:
        """Wait until the engine has finished its requests, at most `drain_s`. Then stop it."""
        queue = member.queue
        if starting is not None:
            await cancel_and_wait(starting)
        if queue.open_requests:
            log.info("engine %s leaves: %d requests are open", member.name, queue.open_requests)
        try:
            async with asyncio.timeout(self.drain_s):
                while queue.open_requests:
                    await asyncio.sleep(0.05)
        except TimeoutError:
            log.warning("engine %s is stopped: %d requests are still open", member.name, queue.open_requests)
        queue.close()
        try:
            await queue.engine.stop()
        except Exception as error:
            log.error("engine %s did not stop cleanly: %s", member.name, error, exc_info=error)
        finally:
            member.stopped.set()
            self._leaving.remove(member)
        log.info("engine %s has left", member.name)


def _excludes(one: _Member, other: _Member) -> bool:
    """Whether two engines may not fit into the machine at the same time."""
    return one.kind == other.kind == "vllm"


def _stands_in(one: _Member, other: _Member) -> bool:
    """Whether ``one`` serves, and was discovered behind the same host as ``other``."""
    if not (one.joined and one.queue.engine.state.alive and _is_discovered(one) and _is_discovered(other)):
        return False
    return one.name.rpartition("-")[0] == other.name.rpartition("-")[0]


def _is_discovered(member: _Member) -> bool:
    return isinstance(member.config, HttpEngineConfig) and member.config.discover is not None
