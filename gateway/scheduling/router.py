"""Routing: chooses the engine for a request among the engines that serve its model and do not rest."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import cycle

from engine_adapter.model_card import ModelCard
from gateway.requests.request import Request
from gateway.scheduling.engine_queue import EngineQueue
from gateway.scheduling.placement import keeps_share
from gateway.scheduling.routing import LeastLoad, Routing

log = logging.getLogger("antares.router")

MAX_OWNED = 10_000
"""Stored responses whose engine is remembered. The oldest are forgotten first; bounds memory to a few MB."""


MAX_POOLS = 1000
"""Models whose pools are kept, since clients may invent names. Then the oldest is found again."""


class UnknownModel(Exception):  # noqa: N818 - named after its cause
    """No engine serves the model."""


class Router:
    """Holds one `EngineQueue` per engine; ``engine_queues`` must not be empty. `join` and `leave` change the list.

    The *pool* of a model is the engines that serve it, dead ones included: they still own their models. ``routing``
    chooses one that is alive. ``clock`` returns monotonic seconds.
    """

    def __init__(
        self,
        engine_queues: list[EngineQueue],
        routing: Routing | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.engine_queues = engine_queues
        self.routing: Routing = routing or LeastLoad()
        self._clock = clock
        self._by_name = {engine_queue.engine.name: engine_queue for engine_queue in self.engine_queues}
        self._owners: OrderedDict[str, str] = OrderedDict()
        self._pools: dict[str, list[EngineQueue]] = {}
        self._pool_names: dict[str, str] = {}
        """`Request.pool` of each of `_pools`."""
        self._models: list[dict[str, ModelCard] | None] = []
        """The models of each engine when `_pools` was made."""
        for engine_queue in self.engine_queues:
            engine_queue.can_move = partial(self._can_move, engine_queue)

    # --- models -------------------------------------------------------------------------------------------------------

    def pool(self, model: str) -> list[EngineQueue]:
        """Return the engines that serve ``model``; "" is the default model.

        They are the engines that list it. If there are none, they are the engines that serve any model, or else those
        whose models are not known yet. Raises `UnknownModel`.
        """
        queues = self.engine_queues
        models = [queue.engine.state.models for queue in queues]
        changed, self._models = models != self._models, models
        if changed:
            self._forget_pools()
        pool = self._pools.get(model)
        if pool is not None:
            return pool
        pool = self._pools[model] = self._find_pool(model or self.default_model)
        self._pool_names[model] = self._pool_name(model, pool)
        if len(self._pools) > MAX_POOLS:
            oldest = next(iter(self._pools))
            del self._pools[oldest], self._pool_names[oldest]
        return pool

    def _pool_name(self, model: str, pool: list[EngineQueue]) -> str:
        """Return one name for all models of the same engines, such as aliases and LoRA adapters: their own model's."""
        own = pool[0].engine.state.model
        if own in ("", model):
            return model
        try:
            return own if self._find_pool(own) == pool else model
        except UnknownModel:
            # An alias has the name of the engine's own model.
            return model

    def _forget_pools(self) -> None:
        self._pools.clear()
        self._pool_names.clear()

    def _find_pool(self, model: str) -> list[EngineQueue]:
        queues = self.engine_queues
        pool = (
            [queue for queue in queues if queue.engine.state.own_name(model) is not None]
            or [queue for queue in queues if queue.engine.state.serves_any_model]
            or [queue for queue in queues if queue.engine.state.models is None]
        )
        if not pool:
            raise UnknownModel(model)
        return pool

    @property
    def default_model(self) -> str:
        """The model of requests that name none: the first of the first engine whose models are known."""
        for queue in self.engine_queues:
            models = queue.engine.state.models
            if models is not None:
                return next(iter(models), "")
        return ""

    def cards(self) -> dict[str, ModelCard]:
        """Return one card for every name that clients can use. The context length is the smallest of its engines."""
        cards: dict[str, ModelCard] = {}
        for queue in self.engine_queues:
            state = queue.engine.state
            aliases = [(alias, own) for alias in state.aliases if (own := state.own_name(alias)) is not None]
            names = [(name, name) for name in state.models or () if name not in state.aliases]
            for name, own in [*names, *aliases]:
                card = (state.models or {}).get(own) or ModelCard(own)
                cards[name] = _merged(name, card, cards.get(name))
        return cards

    @property
    def knows_models(self) -> bool:
        """Whether any engine has reported its models."""
        return any(queue.engine.state.models is not None for queue in self.engine_queues)

    # --- placement ----------------------------------------------------------------------------------------------------

    def place(self, request: Request) -> EngineQueue:
        """Return the queue for ``request``: of the engines in its pool that can serve it now, the one of `routing`.

        An engine whose rest is over comes first: the request probes it, and is sent to another engine if that fails.
        Engines that rest come after the others, then engines that are down, then those that failed the request.
        Raises `UnknownModel`.
        """
        pool = self._candidates(request)
        if len(pool) == 1:
            return pool[0]
        alive = [queue for queue in pool if queue.engine.state.alive]
        if not alive:
            return self.routing.best(request, pool)
        if True in [queue.circuit.in_doubt for queue in alive]:  # a list is built faster than `any` asks a generator
            return self._place_in_doubt(request, alive)
        return self._best(request, alive)

    def _place_in_doubt(self, request: Request, alive: list[EngineQueue]) -> EngineQueue:
        """Return the queue for ``request`` as `place` does, among engines of which some failed lately."""
        now = self._clock()
        ready = [queue for queue in alive if queue.circuit.admits(now)]
        if not ready:
            back_at = min(queue.circuit.back_at for queue in alive)
            return self._best(request, [queue for queue in alive if queue.circuit.back_at == back_at])
        due = [queue for queue in ready if queue.circuit.due_for_probe(now)]
        if 0 < len(due) < len(alive) and not request.failed_on:
            return due[0]
        first: EngineQueue | None = None
        groups: dict[tuple[bool, bool], list[EngineQueue]] = {}
        for queue in ready:
            groups.setdefault((queue in due, queue.circuit.suspected(now)), []).append(queue)
        for _, group in sorted(groups.items(), key=lambda item: item[0]):
            while group:
                best = self._best(request, group)
                if keeps_share(request, best.circuit.share(now)):
                    return best
                first = first or best
                group.remove(best)
        assert first is not None
        return first

    def _best(self, request: Request, queues: list[EngineQueue]) -> EngineQueue:
        """Return the best of ``queues`` for ``request``."""
        return queues[0] if len(queues) == 1 else self.routing.best(request, queues)

    def others(self, request: Request) -> list[EngineQueue]:
        """Return the live engines of the request's pool that have not failed it."""
        try:
            pool = self._pool_of(request)
        except UnknownModel:
            return []
        return [q for q in pool if q.engine.state.alive and q.engine.name not in request.failed_on]

    def choose(self, model: str, owner: str, tried: Iterable[str]) -> EngineQueue | None:
        """Return the engine for a request that is not scheduled: the first live one that does not rest.

        ``model``: what the request names, "" for none. ``owner``: the only engine that can serve it; "" for any.
        ``tried``: names of engines that have failed it. None if no live engine is left. Raises `UnknownModel`.
        """
        now = self._clock()
        only = self._by_name.get(owner)
        pool = [only] if only is not None else self.pool(model) if model else self.engine_queues
        alive = [queue for queue in pool if queue.engine.state.alive and queue.engine.name not in tried]
        return min(alive, key=lambda queue: (not queue.circuit.admits(now), queue.circuit.suspected(now)), default=None)

    def _pool_of(self, request: Request) -> list[EngineQueue]:
        owner, model = self._by_name.get(request.pinned_to), request.requested_model
        pool = [owner] if owner is not None else self.pool(model)
        request.pool = self._pool_names.get(model, model)
        return pool

    def _candidates(self, request: Request) -> list[EngineQueue]:
        pool, failed_on = self._pool_of(request), request.failed_on
        return ([queue for queue in pool if queue.engine.name not in failed_on] or pool) if failed_on else pool

    def _can_move(self, engine_queue: EngineQueue, request: Request) -> bool:
        """Whether an engine other than that of ``engine_queue`` is alive. It must not rest, unless this one is down."""
        now, is_down = self._clock(), not engine_queue.engine.state.alive
        others = (queue for queue in self.others(request) if queue is not engine_queue)
        return any(is_down or queue.circuit.state != "open" or queue.circuit.admits(now) for queue in others)

    # --- outcomes -----------------------------------------------------------------------------------------------------

    def on_sent(self, engine_queue: EngineQueue, request: Request) -> None:
        """Note that ``request`` was queued for the engine."""
        if len(self.engine_queues) > 1:
            self.routing.on_sent(request, engine_queue)
        engine_queue.circuit.on_sent(request.id, self._clock())

    def on_ended(self, engine_queue: EngineQueue, request: Request) -> None:
        """Note that ``request`` is no longer with the engine, whatever happened. Called after any other outcome."""
        engine_queue.circuit.on_dropped(request.id, self._clock())

    def on_success(self, engine_queue: EngineQueue, sent_at: float) -> None:
        """Note that the engine began its response to a request that it was sent at ``sent_at`` (monotonic s)."""
        if engine_queue.circuit.on_success(sent_at, self._clock()):
            log.info("engine %s serves again; its share of requests grows", engine_queue.engine.name)

    def on_completed(self, engine_queue: EngineQueue) -> None:
        """Note that the engine completed a response."""
        engine_queue.circuit.on_completed()

    def on_failure(
        self,
        engine_queue: EngineQueue,
        reason: str,
        sent_at: float,
        retry_after_s: float | None = None,
        begun: bool = False,
    ) -> None:
        """Note that the engine failed a request. If it rests from now on, its waiting requests move elsewhere."""
        if engine_queue.retired:
            return
        now, circuit = self._clock(), engine_queue.circuit
        if reason == "http_429":
            rests = circuit.on_overload(sent_at, now, retry_after_s)
        else:
            rests = circuit.on_failure(reason, sent_at, now, retry_after_s, begun)
        if rests:
            name, rest_s = engine_queue.engine.name, circuit.back_at - now
            log.warning("engine %s rests for %.1f s: its last failure was %s", name, rest_s, reason)
            engine_queue.reroute()

    def suspect(self, engine_queue: EngineQueue) -> None:
        """Avoid the engine for a moment: it failed a request that may fail on every engine."""
        engine_queue.circuit.suspect(self._clock())

    # --- stored responses ---------------------------------------------------------------------------------------------

    def remember_owner(self, response_id: str, engine_name: str) -> None:
        """Remember which engine created a stored response. Only that engine has it."""
        self._owners[response_id] = engine_name
        self._owners.move_to_end(response_id)
        if len(self._owners) > MAX_OWNED:
            self._owners.popitem(last=False)

    def owner_of(self, response_id: str) -> str:
        """Return the name of the engine that created the response; "" if it is not known."""
        return self._owners.get(response_id, "")

    # --- lifecycle ----------------------------------------------------------------------------------------------------

    @property
    def alive(self) -> bool:
        """Whether any engine can serve."""
        return any(engine_queue.engine.state.alive for engine_queue in self.engine_queues)

    def why_down(self) -> str:
        """Return each engine that is down, with the reason."""
        down = [queue.engine for queue in self.engine_queues if not queue.engine.state.alive]
        return "; ".join(f"engine {engine.name}: {engine.state.why_down}" for engine in down)

    def join(self, engine_queue: EngineQueue, replaced: EngineQueue | None = None) -> None:
        """Send requests to the engine from now on, in place of the ``replaced`` one if given. Calls `offer`."""
        engine_queue.can_move = partial(self._can_move, engine_queue)
        self._forget_pools()
        if replaced is None:
            self.engine_queues.append(engine_queue)
        else:
            self.engine_queues[self.engine_queues.index(replaced)] = engine_queue
            self._by_name.pop(replaced.engine.name, None)
        self._by_name[engine_queue.engine.name] = engine_queue
        if replaced is not None:
            replaced.retire()
        self.offer(engine_queue)

    def leave(self, engine_queue: EngineQueue) -> None:
        """Remove the engine from routing, and place its waiting requests again. It must not be the last engine."""
        self.engine_queues.remove(engine_queue)
        self._forget_pools()
        del self._by_name[engine_queue.engine.name]
        engine_queue.retire()

    def offer(self, engine_queue: EngineQueue) -> None:
        """Place some of the waiting requests again: this engine can serve from now on.

        It is offered its share: of the requests that wait for the n engines of its pool, each nth.
        """
        name = engine_queue.engine.name
        if not engine_queue.engine.state.alive or self._by_name.get(name) is not engine_queue:
            return
        shares: dict[str, Iterator[bool]] = {}

        def moves(request: Request) -> bool:
            model = request.requested_model
            if model not in shares:
                shares[model] = self._each_nth(model, engine_queue)
            if name in request.failed_on or request.pinned_to in self._by_name:
                return False
            return next(shares[model])

        for queue in self.engine_queues:
            if queue is not engine_queue:
                queue.reroute(moves)

    def _each_nth(self, model: str, engine_queue: EngineQueue) -> Iterator[bool]:
        """Return True for each nth request, if the engine is one of the n engines of ``model``; always False if not."""
        try:
            pool = self.pool(model)
        except UnknownModel:
            pool = []
        return cycle([*[False] * (len(pool) - 1), True] if engine_queue in pool else [False])

    def close(self) -> None:
        """Close every queue."""
        for engine_queue in self.engine_queues:
            engine_queue.close()


def _merged(name: str, card: ModelCard, other: ModelCard | None) -> ModelCard:
    """Return ``card`` under the name ``name``, merged with the ``other`` engine's card of that name."""
    lengths = [c.max_model_len for c in (card, other) if c is not None and c.max_model_len is not None]
    base = other or ModelCard(name, None, card.owned_by, card.created, card.root if name == card.id else card.id)
    return ModelCard(
        name, min(lengths, default=None), base.owned_by, base.created, base.root, base.parent or card.parent
    )
