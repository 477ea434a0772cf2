"""Best-effort preemption: in a full engine, best-effort requests give their slots and KV memory to the others.

Sitting out steps (`engine_adapter.gates.slack`) leaves time to other requests, but neither slots nor memory. So when
these are short, the newest best-effort requests are preempted: they lose their memory, wait, and later are computed
again and continue. Of a capacity C (slots, and likewise blocks of KV memory), let b be what the other requests have or
want, and u what best-effort requests have:

    b + u - C          is freed, newest best-effort request first,
    C - peak(b) - u    is given back, oldest first and one request at a time,

with the peak over `peak_window_s`, because recomputing takes time. One block per running request stays free besides.
INVARIANT: the first running best-effort requests, up to `best_effort_share` of the slots, are never preempted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

from engine_adapter.gates.constants import SLACK


class RecentPeak:
    """The maximum of a value over the latest `peak_window_s` seconds."""

    def __init__(self) -> None:
        self._falling: deque[tuple[float, int]] = deque()  # (time, value) of values that no later one has reached

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


class PreemptionPlan(NamedTuple):
    """The changes before a step, as the scheduler's own request objects.

    Running requests to ``preempt``, newest first. Best-effort requests to move to the ``front`` of the queue or to its
    end (``back``, in order). Those ``held`` out of it for this step, the preempted ones included.
    """

    preempt: list[Any]
    front: list[Any]
    back: list[Any]
    held: list[Any]


class BestEffortPreemption:
    """Plans the preemptions of an engine with the given ``capacity``."""

    def __init__(self, capacity: Capacity) -> None:
        self._capacity = capacity
        self._reserved = reserved_slots(capacity.slots)
        self._peaks = RecentPeak(), RecentPeak()

    def plan(
        self, now: float, free: Capacity, running: Sequence[Member], waiting: Sequence[Member]
    ) -> PreemptionPlan | None:
        """Plan for the step at ``now`` (s); None changes nothing. ``running`` is oldest first, ``waiting`` as queued.

        Only preemptible and prefilling requests matter in ``running``; without preemptible ones, both may be empty.
        """
        preemptible = [m for m in running if m.preemptible]
        arrivals = [m for m in waiting if not m.preemptible]
        used, held, count = self._capacity.slots - free.slots, sum(m.held for m in preemptible), len(preemptible)
        prompts = [*arrivals, *(m for m in running if m.prefilling and not m.preemptible)]
        want = Capacity(len(arrivals), sum(m.needed - m.held for m in prompts))
        others = Capacity(used - count + want.slots, self._capacity.blocks - free.blocks - held + want.blocks)
        peak = Capacity(*(peak.note(now, value) for peak, value in zip(self._peaks, others, strict=True)))
        if not peak.slots or not (preemptible or waiting):
            return None
        victims = self._victims(preemptible, Capacity(want.slots - free.slots, want.blocks + used - free.blocks))
        resumable = [*reversed(victims), *(m for m in waiting if m.preemptible and m.preempted_before)]
        new = [m for m in waiting if m.preemptible and not m.preempted_before]
        recomputing = any(m.prefilling and m.preempted_before for m in preemptible)
        front: list[Member] = []
        if (resumable or new) and not victims and not recomputing:
            first = (resumable or new)[0]
            spare_slots, spare_blocks = (most - value for most, value in zip(self._capacity, peak, strict=True))
            if count < self._reserved and free.slots > 0 and free.blocks > first.needed + used:
                front.append((resumable or new).pop(0))
            elif resumable and not want.slots and count < spare_slots and held + first.needed + used < spare_blocks:
                new.append(resumable.pop(0))
        return PreemptionPlan(*([m.request for m in members] for members in (victims, front, new, resumable)))

    def _victims(self, preemptible: Sequence[Member], short: Capacity) -> list[Member]:
        """Return the newest decoding best-effort requests whose slots and blocks cover what is ``short``."""
        victims: list[Member] = []
        freed = 0
        for member in reversed([m for m in preemptible[self._reserved :] if not m.prefilling]):
            if len(victims) >= short.slots and freed >= short.blocks:
                break
            victims.append(member)
            freed += member.held
        return victims


def reserved_slots(slots: int) -> int:
    """Return how many of an engine's slots best-effort requests keep, however full it is."""
    return max(1, int(SLACK.best_effort_share * slots))
