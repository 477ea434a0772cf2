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
        self._slots, self._blocks = RecentPeak(), RecentPeak()

    def plan(
        self, now: float, free: Capacity, running: Sequence[Member], waiting: Sequence[Member]
    ) -> PreemptionPlan | None:
        """Plan for the step at ``now`` (s); None changes nothing. ``running`` is oldest first, ``waiting`` as queued.

        Only preemptible and prefilling requests matter in ``running``; without preemptible ones, both may be empty.
        """
        capacity, preemptible = self._capacity, [m for m in running if m.preemptible]
        arrivals = [m for m in waiting if not m.preemptible]
        prompts = [*arrivals, *(m for m in running if m.prefilling and not m.preemptible)]
        wanted, used = sum(m.needed - m.held for m in prompts), capacity.slots - free.slots
        held, count = sum(m.held for m in preemptible), len(preemptible)
        peak_slots = self._slots.note(now, used - count + len(arrivals))
        peak_blocks = self._blocks.note(now, capacity.blocks - free.blocks - held + wanted)
        if not peak_slots or not (preemptible or waiting):
            return None
        victims = self._victims(preemptible, len(arrivals) - free.slots, wanted + used - free.blocks)
        resumable = [*reversed(victims), *(m for m in waiting if m.preemptible and m.preempted_before)]
        new = [m for m in waiting if m.preemptible and not m.preempted_before]
        recomputing = any(m.prefilling and m.preempted_before for m in preemptible)
        front: list[Member] = []
        if (resumable or new) and not victims and not recomputing:
            first = (resumable or new)[0]
            fits = peak_slots + count < capacity.slots and peak_blocks + held + first.needed + used < capacity.blocks
            if count < self._reserved and free.slots > 0 and free.blocks > first.needed + used:
                front.append((resumable or new).pop(0))
            elif resumable and not arrivals and fits:
                new.append(resumable.pop(0))
        return PreemptionPlan(*([m.request for m in members] for members in (victims, front, new, resumable)))

    def _victims(self, preemptible: Sequence[Member], slots: int, blocks: int) -> list[Member]:
        """Return the newest decoding best-effort requests that together have ``slots`` and ``blocks``."""
        victims: list[Member] = []
        for member in reversed([m for m in preemptible[self._reserved :] if not m.prefilling]):
            if len(victims) >= slots and blocks <= 0:
                break
            victims.append(member)
            blocks -= member.held
        return victims


def reserved_slots(slots: int) -> int:
    """Return how many of an engine's slots best-effort requests keep, however full it is."""
    return max(1, int(SLACK.best_effort_share * slots))
