"""Routing by headroom: chooses the engine that keeps the request's bounds and leaves the most room to others.

The strictest pace P* on an engine limits the length of its steps. T(R) of each step goes to the decodes of all its
requests R, so the share 1 - T(R)/P* is left for prompts. On an A100, whose shortest step takes 12.5 ms, that share is
at most 0.58 at a pace of 30 ms, and 0.75 at 50 ms. So one request of 30 ms costs all others on its engine, and similar
paces share engines:

    1 over the last `MEMORY_S`, w_k tokens of work came with pace P_k; they need n_k = w_k / (1 - T(1)/P_k) of capacity
    2 in order of pace, each pace gets its share n_k / sum(n) of the engines, the fastest ones for the tightest pace
    3 an engine fits r if slots and memory suffice, T(R + r) <= P*(R + r), and r's prompt ends before its deadline
    4 of the engines of its pace that fit, r goes to the one with the least 2 T(R + r) + mu * (backlog + own) / share
    5 if none fits, r goes to an engine of a tighter pace that fits, or to a looser one that has `AMPLE` room for it
    6 if none does, r waits on the engine with the fewest requests among those of its pace and of tighter ones

Line 6 decides at overload only. Measured at twice the capacity, waiting on an engine of its own pace loses 2% of the
goodput: an engine that all paces wait for serves the cheapest of them.

The shares follow the mix, and an engine at the edge between two paces serves both. An engine's own step-time model,
queue, memory and prefix index answer lines 3 and 4, and prompts count by their uncached tokens, at mu seconds each. So
engines may differ, and a chat returns to the engine that has its history cached as far as that saves time.
"""

from __future__ import annotations

import math
import zlib
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from engine_adapter.service_kind import ServiceKind
from gateway.requests.request import Request
from gateway.scheduling.engine_queue import EngineQueue

MEMORY_S = 30.0
"""Time constant (s) of the mix of paces. A few times as long as responses take, so that the bands are steady."""

RENEWED = 0.1
"""The engines are divided again when a request's pace has this part more work than at the last division, and after this
part of `MEMORY_S` at the latest. So the first requests of a pace divide them. Without its own band, a tight pace would
go to all engines and limit them until its longest answers end. With a division each second, and none in the first one,
8 A100s held 3% less in 30 s."""

PACE_STEP = 1.1
"""Ratio of neighbouring paces that are told apart. Equal bounds must get equal bands; convention."""

EDGE = 0.1
"""Least part of an engine that a pace uses. Without, a sliver of a band would set the pace of a whole engine."""

AMPLE = 0.67
"""Longest step on an engine of a looser pace, as a share of the request's pace. There the tight request costs the
others little, because the engine's steps are short anyway. Measured: 0.5 and 0.67 do not differ at capacity."""

FASTER = 1.25
"""Ratio of shortest steps from which one engine counts as faster than another: above the noise of the estimates."""

COMPARED = 8
"""Engines of a band that are compared. Of more, a random choice is compared, so a decision costs the same in any pool.
The least of 8 is in the best eighth on average."""

UNTESTED_S = 30.0
"""Seconds after which an idle engine that fits is tried: an estimate that no request tests goes out of date."""

LEAST_SHARE = 0.01
"""Least share of time that counts as left for prompts: bounds the cost of a full engine."""

MAX_PLACES = 10_000
"""Names of engines whose place is kept. Names of discovered engines change; bounds memory."""

MAX_OWNERS = 100_000
"""Prompts whose engine is remembered, and pools whose paces are. The oldest are forgotten first."""


@dataclass(slots=True)
class PaceBands:
    """The division of one pool's engines between the paces of its requests.

    ``ordered``: the engines, the fastest one first. A band is a range of positions.
    """

    ordered: list[EngineQueue] = field(default_factory=list)
    _queues: list[EngineQueue] = field(default_factory=list)
    """The engines in the order of the last call."""
    _places: dict[str, int] = field(default_factory=dict)
    _work: dict[int, float] = field(default_factory=dict)
    """The tokens of each pace, by its number: what is left at ``_divided_s``, and all that came since."""
    _paces: list[int] = field(default_factory=list)
    _bands: list[tuple[int, int]] = field(default_factory=list)
    _divided_s: float = -math.inf
    _known: dict[int, float] = field(default_factory=dict)
    """``_work`` at ``_divided_s``."""

    def note(self, request: Request) -> None:
        """Count the work of ``request``: its uncached prompt and its predicted output, in tokens."""
        if not self._bands:
            return  # A lone engine is not divided, and its work would never fade.
        pace = _pace_number(request)
        tokens = request.uncached_tokens + request.predicted_tokens * request.sequences
        self._work[pace] = self._work.get(pace, 0.0) + tokens

    def of(self, request: Request, queues: Sequence[EngineQueue], now: float) -> tuple[int, int]:
        """Return the band for ``request``. Divides ``queues`` again if they, the paces or the mix have changed."""
        pace = _pace_number(request)
        renewed = self._work.get(pace, 0.0) >= (1 + RENEWED) * self._known.get(pace, 0.0)
        if renewed or now - self._divided_s >= RENEWED * MEMORY_S or queues != self._queues:
            self._divide(queues, now, pace)
        return self._bands[self._paces.index(pace)]

    def _divide(self, queues: Sequence[EngineQueue], now: float, pace: int) -> None:
        """Lines 1 and 2 of the module, with a band for ``pace`` too."""
        kept = math.exp((self._divided_s - now) / MEMORY_S) if self._divided_s > -math.inf else 1.0
        self._divided_s = now
        self._work = {known: work * kept for known, work in self._work.items() if work * kept > 1.0}
        self._work.setdefault(pace, 1.0)
        self._known = self._work.copy()
        engines = self._in_order(queues)
        self._queues, self.ordered = list(queues), [queue for queue, _, _ in engines]
        self._paces, self._bands = sorted(self._work), []
        step_s = sum(step_s for _, step_s, _ in engines) / len(engines)
        shortest_s = min(step_s for _, step_s, _ in engines)
        needs = [
            self._work[pace] / max(LEAST_SHARE, 1 - step_s / PACE_STEP**pace) if PACE_STEP**pace > shortest_s else 1.0
            for pace in self._paces
        ]
        pace_s = 1 / (sum(need / PACE_STEP**pace for need, pace in zip(needs, self._paces, strict=True)) / sum(needs))
        speeds = [max(LEAST_SHARE, 1 - step_s / pace_s) / token_s for _, step_s, token_s in engines]
        ends = _cumulated(speeds)
        first = 0.0
        for last in _cumulated(needs):
            self._bands.append(_band(first, last, ends))
            first = last

    def _in_order(self, queues: Sequence[EngineQueue]) -> list[tuple[EngineQueue, float, float]]:
        """Return each engine, its shortest step (s) and its seconds per prompt token, the fastest step first.

        The order changes only for engines that differ by `FASTER`, since estimates of equal engines do too. An engine
        that was missing for a while gets its place back.
        """
        places = self._places
        if len(places) > MAX_PLACES:
            places.clear()
        engines = []
        for queue in queues:
            state = queue.engine.state
            curve = state.step_time.curve
            token_s = curve.prefill_token_s(0.0, state.max_num_batched_tokens, math.inf)
            engines.append((queue, curve.step_s(1, 0), max(token_s, 1e-9)))
            if queue.engine.name not in places:
                places[queue.engine.name] = max(places.values(), default=0) + 1
        engines.sort(key=lambda engine: places[engine[0].engine.name])
        free = [places[queue.engine.name] for queue, _, _ in engines]
        for end in range(1, len(engines)):
            at = end
            while at and engines[at][1] * FASTER < engines[at - 1][1]:
                engines[at], engines[at - 1] = engines[at - 1], engines[at]
                at -= 1
        places.update(zip((queue.engine.name for queue, _, _ in engines), free, strict=True))
        return engines


class Headroom:
    """Lines 3 to 6 of the module, with the bands of each pool."""

    name = "headroom"

    def __init__(self) -> None:
        self._pools: dict[str, PaceBands] = {}
        self._owners: dict[int, str] = {}
        self._last_s: dict[str, float] = {}
        """When each engine got its last request, by name."""

    def best(self, request: Request, queues: Sequence[EngineQueue]) -> EngineQueue:
        """See `gateway.scheduling.routing.Routing.best`."""
        now = queues[0].now()
        bands = self._bands_of(request.pool)
        first, end = bands.of(request, queues, now)
        engines = bands.ordered
        own = self._least(request, engines[first:end], now)
        if own is not None:
            return own.queue
        tighter = self._least(request, engines[:first], now)
        looser = self._least(request, engines[end:], now, looser=True)
        beside = [judged for judged in (tighter, looser) if judged is not None]
        if beside:
            return min(beside, key=lambda judged: judged.cost_s).queue
        return min(self._some(request, engines[:end]), key=lambda queue: queue.admission.expected_batch(now).slots)

    def _least(self, request: Request, queues: list[EngineQueue], now: float, looser: bool = False) -> _Judged | None:
        """Return the engine of ``queues`` with the least cost of those that fit ``request``; None if none is found.

        Of many, `COMPARED` random ones are compared, and as many again if none of them fits.
        """
        least: _Judged | None = None
        for at, queue in enumerate(self._some(request, queues)):
            if at == COMPARED and least is not None:
                break
            judged = _judge(request, queue, now, looser)
            if not judged.fits:
                continue
            if not queue.running and self._untested(queue, now):
                return judged
            if least is None or judged.cost_s < least.cost_s:
                least = judged
        return least

    def _untested(self, queue: EngineQueue, now: float) -> bool:
        """Whether the engine got no request for `UNTESTED_S`."""
        return now - self._last_s.setdefault(queue.engine.name, now) > UNTESTED_S

    def on_sent(self, request: Request, engine_queue: EngineQueue) -> None:
        """Note the work of ``request``, when the engine got it, and which engine has its prompt."""
        if len(self._last_s) > MAX_PLACES:
            self._last_s.clear()
        self._last_s[engine_queue.engine.name] = engine_queue.now()
        self._bands_of(request.pool).note(request)
        if request.blocks:
            owners, last = self._owners, request.blocks[-1]
            owners.pop(last, None)
            owners[last] = engine_queue.engine.name
            if len(owners) > MAX_OWNERS:
                del owners[next(iter(owners))]

    def _bands_of(self, pool: str) -> PaceBands:
        bands = self._pools.get(pool)
        if bands is None:
            if len(self._pools) >= MAX_OWNERS:
                self._pools.clear()
            bands = self._pools[pool] = PaceBands()
        return bands

    def _some(self, request: Request, queues: list[EngineQueue]) -> Iterator[EngineQueue]:
        """Yield ``queues`` if they are few. Of many, yield twice `COMPARED` random ones, some more than once.

        The one that has the prompt's beginning comes first. A request always gets the same ones.
        """
        count = len(queues)
        if count <= COMPARED:
            yield from queues
            return
        owner = next((self._owners[block] for block in reversed(request.blocks) if block in self._owners), None)
        if owner is not None:
            yield from (queue for queue in queues if queue.engine.name == owner)
        number = zlib.crc32(request.id.encode())
        for _ in range(2 * COMPARED):
            # A linear congruential generator, because seeding Python's takes as long as comparing four engines.
            number = (1664525 * number + 1013904223) % 2**32
            yield queues[number * count >> 32]


class _Judged(NamedTuple):
    """An engine as a place for a request: whether it fits, and its cost, the seconds until the first token there."""

    fits: bool
    cost_s: float
    queue: EngineQueue


def _judge(request: Request, queue: EngineQueue, now: float, looser: bool = False) -> _Judged:
    """Judge an engine for ``request``. ``looser``: the engine is for looser paces."""
    admission = queue.admission
    batch = admission.expected_batch(now)
    engine, decoding, sequences = batch.engine, batch.decoding, request.sequences
    curve = engine.step_time.curve
    pace_s = request.pace_s if request.pace_s is not None and request.kind is ServiceKind.PACED else math.inf
    pace_s *= engine.tokens_per_step
    strictest_s = min(batch.strictest_s, pace_s)
    context = (request.prompt_tokens + request.predicted_tokens / 2) * sequences
    step_s = curve.step_s(decoding + sequences, batch.context + context)
    cached = admission.prefixes.cached_tokens(request) if request.blocks and engine.prefix_caching else 0
    tokens = batch.backlog + max(1, request.prompt_tokens - cached)
    token_s = curve.prefill_token_s(decoding + sequences, engine.max_num_batched_tokens, strictest_s - step_s)
    cost_s = 2 * step_s + token_s * tokens / max(LEAST_SHARE, 1 - step_s / strictest_s)
    fits = step_s <= (AMPLE * pace_s if looser else strictest_s) and batch.has_room_for(request)
    return _Judged(fits and now + cost_s <= request.deadline_s, cost_s, queue)


def _pace_number(request: Request) -> int:
    """Return the request's pace on a scale of `PACE_STEP`; of a request without one, the number of a slow pace."""
    pace_s = request.pace_s if request.kind is ServiceKind.PACED and request.pace_s is not None else math.inf
    return round(math.log(min(max(pace_s, 1e-4), 10.0), PACE_STEP))


def _cumulated(weights: Sequence[float]) -> list[float]:
    """Return the running sums of ``weights``, as shares of their total."""
    total, sums, at = sum(weights), [], 0.0
    for weight in weights:
        at += weight / total
        sums.append(at)
    return sums


def _band(first: float, last: float, ends: Sequence[float]) -> tuple[int, int]:
    """Return the engines that a band from ``first`` to ``last`` covers by `EDGE` at least; ``ends``: their upper ends.

    A band that covers less of every engine gets the one at its middle.
    """
    covered = [
        at
        for at in range(bisect_right(ends, first), min(bisect_left(ends, last) + 1, len(ends)))
        if min(last, ends[at]) - max(first, start := ends[at - 1] if at else 0.0) >= EDGE * (ends[at] - start)
    ]
    if covered:
        return covered[0], covered[-1] + 1
    middle = min(bisect_left(ends, (first + last) / 2), len(ends) - 1)
    return middle, middle + 1
