"""Best-effort preemption: in a full engine, best-effort requests give their slots and KV memory to the others.

While no other request wants them, best-effort requests may fill the engine. When others arrive, sitting out steps
(`engine_adapter.gates.slack`) leaves time, but neither slots nor memory. So the newest best-effort requests are
preempted: they lose their memory and wait, and later they are computed again and continue. Of a capacity C (slots, and
likewise blocks of KV memory), let b be what the other requests have or want, and u what best-effort requests have:

    b + u - C          is freed, newest best-effort request first,
    C - peak(b) - u    is given back, oldest first and one request at a time,

with the peak over `peak_window_s`, because computing a request again costs time. One block for each running request
stays free besides: it may need it in the next step.

INVARIANT: the oldest best-effort requests, up to `best_effort_share` of the slots, are never preempted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from engine_adapter.gates.constants import SLACK


class RecentPeak:
    """The maximum of a value over the latest `peak_window_s` seconds."""

    def __init__(self) -> None:
        self._falling: deque[tuple[float, int]] = deque()
        """(time, value) of each value that no later one has reached."""

    def note(self, now: float, value: int) -> int:
        """Record ``value`` at ``now`` (s) and return the peak."""
        falling = self._falling
        while falling and falling[-1][1] <= value:
            falling.pop()
        falling.append((now, value))
        while falling[0][0] < now - SLACK.peak_window_s:
            falling.popleft()
        return falling[0][1]


class Capacity(NamedTuple):
    """Slots in the batch and blocks of KV memory."""

    slots: int
    blocks: int


class Member(NamedTuple):
    """A request in the engine: the scheduler's own object, the blocks it holds, and those that all its tokens need."""

    request: Any
    preemptible: bool
    held: int
    needed: int
    prefilling: bool = False
    preempted_before: bool = False


@dataclass(slots=True)
class PreemptionPlan:
    """What to do before a step, as the scheduler's own request objects.

    ``preempt``: running requests, newest first. ``paused``: running requests whose prompts are not computed in this
    step. Waiting best-effort requests go in front of the queue (``front``), to its end (``back``, in this order), or
    are ``held`` out of it for this step.
    """

    preempt: list[Any] = field(default_factory=list)
    paused: list[Any] = field(default_factory=list)
    front: list[Any] = field(default_factory=list)
    back: list[Any] = field(default_factory=list)
    held: list[Any] = field(default_factory=list)


class BestEffortPreemption:
    """Plans the preemptions of an engine with the given ``capacity``."""

    def __init__(self, capacity: Capacity) -> None:
        self._capacity = capacity
        self._reserved = reserved_slots(capacity.slots)
        self._slots, self._blocks = RecentPeak(), RecentPeak()
        self._paused_steps = 0

    def note(self, now: float, others: Capacity) -> Capacity:
        """Record what the other requests have or want at ``now`` (s); return the recent peak."""
        slots = self._slots.note(now, min(others.slots, self._capacity.slots))
        return Capacity(slots, self._blocks.note(now, min(others.blocks, self._capacity.blocks)))

    def plan(
        self, now: float, free: Capacity, running: Sequence[Member], waiting: Sequence[Member]
    ) -> PreemptionPlan | None:
        """Plan for the step at ``now`` (s). ``running`` is oldest first, ``waiting`` in queue order.

        Return None if no other request was here recently: then nothing changes.
        """
        mine, others = _split(running)
        queued, arrivals = _split(waiting)
        used, held = self._capacity.slots - free.slots, sum(m.held for m in mine)
        prompts = [*arrivals, *(m for m in others if m.prefilling)]
        want = Capacity(len(arrivals), sum(m.needed - m.held for m in prompts))
        others_blocks = self._capacity.blocks - free.blocks - held
        peak = self.note(now, Capacity(used - len(mine) + want.slots, others_blocks + want.blocks))
        if not peak.slots:
            return None
        victims = self._victims(mine, Capacity(want.slots - free.slots, want.blocks + used - free.blocks))
        plan = PreemptionPlan([m.request for m in victims], self._paused(mine, bool(prompts)))
        resumable = [*reversed(victims), *(m for m in queued if m.preempted_before)]
        new = [m for m in queued if not m.preempted_before]
        recomputing = any(m.prefilling and m.preempted_before for m in mine)
        first = next(iter(resumable or new), None)
        if first is not None and not victims and not recomputing:
            spare = Capacity(self._capacity.slots - peak.slots, self._capacity.blocks - peak.blocks - used - 1)
            if len(mine) < self._reserved and free.slots > 0 and free.blocks > first.needed + used:
                plan.front = [(resumable or new).pop(0).request]
            elif resumable and not want.slots and len(mine) < spare.slots and held + first.needed <= spare.blocks:
                new.append(resumable.pop(0))
        plan.back, plan.held = [m.request for m in new], [m.request for m in resumable]
        return plan

    def _victims(self, mine: Sequence[Member], short: Capacity) -> list[Member]:
        """Return the newest decoding best-effort requests whose slots and blocks cover what is ``short``."""
        victims: list[Member] = []
        freed = 0
        for member in reversed([m for m in mine if not m.prefilling]):
            covered = len(victims) >= short.slots and freed >= short.blocks
            if covered or len(mine) - len(victims) <= self._reserved:
                break
            victims.append(member)
            freed += member.held
        return victims

    def _paused(self, mine: Sequence[Member], others_prompts: bool) -> list[Any]:
        """Return the prompts to pause: while other prompts are there, all but in one of `steps_per_turn` steps."""
        prefilling = [m.request for m in mine if m.prefilling]
        if not (prefilling and others_prompts):
            return []
        self._paused_steps = (self._paused_steps + 1) % SLACK.steps_per_turn
        return prefilling if self._paused_steps else []


def reserved_slots(slots: int) -> int:
    """Return how many of an engine's slots best-effort requests keep, however full it is."""
    return max(1, int(SLACK.best_effort_share * slots))


def _split(members: Iterable[Member]) -> tuple[list[Member], list[Member]]:
    """Return the preemptible members and the others."""
    mine: list[Member] = []
    others: list[Member] = []
    for member in members:
        (mine if member.preemptible else others).append(member)
    return mine, others
