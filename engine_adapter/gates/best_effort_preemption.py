"""Best-effort preemption: in a full engine, best-effort requests give their slots and KV memory to the others.

While no other request wants them, best-effort requests may fill the engine. When others arrive, sitting out steps
(`engine_adapter.gates.slack`) leaves time, but neither slots nor memory. So the newest best-effort requests are
preempted: they lose their memory and wait, and once there is room they are computed again and continue. Let C be the
capacity (slots, and likewise blocks of KV memory), b what the other requests have or want, u what best-effort requests
have. Then

    b + u - C               is freed, newest best-effort request first,
    C - peak(b) - u         is given back, oldest first, one request at a time,

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
    """The maximum of a value over the latest ``window_s`` seconds."""

    def __init__(self, window_s: float = SLACK.peak_window_s) -> None:
        self._window_s = window_s
        self._falling: deque[tuple[float, float]] = deque()
        """(time, value) of each value that no later one has reached."""

    def note(self, now: float, value: float) -> float:
        """Record ``value`` at ``now`` (s) and return the peak."""
        falling = self._falling
        while falling and falling[-1][1] <= value:
            falling.pop()
        falling.append((now, value))
        while falling[0][0] < now - self._window_s:
            falling.popleft()
        return falling[0][1]


class Capacity(NamedTuple):
    """Slots in the batch and blocks of KV memory."""

    slots: int
    blocks: int


class Member(NamedTuple):
    """A request in the engine as the preemption sees it.

    ``request`` is the scheduler's own object. ``held`` blocks are its, ``needed`` ones hold all its tokens.
    """

    request: Any
    preemptible: bool
    held: int
    needed: int
    prefilling: bool = False
    preempted_before: bool = False


@dataclass(slots=True)
class PreemptionPlan:
    """What to do before a step, as the scheduler's own request objects.

    ``preempt``: running requests to preempt, newest first. ``paused``: prompts that are not computed in this step. The
    waiting best-effort requests are split into ``front`` (before all others), ``back`` (after all others, in this
    order) and ``held`` (not scheduled in this step).
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
        self._peak_slots, self._peak_blocks = RecentPeak(), RecentPeak()
        self._paused_steps = 0

    def note(self, now: float, others: Capacity) -> Capacity:
        """Record what the other requests have or want at ``now`` (s); return the recent peak."""
        slots = self._peak_slots.note(now, min(others.slots, self._capacity.slots))
        return Capacity(int(slots), int(self._peak_blocks.note(now, min(others.blocks, self._capacity.blocks))))

    def plan(
        self, now: float, free: Capacity, running: Sequence[Member], waiting: Sequence[Member]
    ) -> PreemptionPlan | None:
        """Plan for the step at ``now`` (s). ``running`` is oldest first, ``waiting`` in queue order.

        Return None when no other request was here recently: nothing changes then.
        """
        mine, others = _split(running)
        new_mine, arrivals = _split(waiting)
        used = self._capacity.slots - free.slots
        have = Capacity(used - len(mine), self._capacity.blocks - free.blocks - sum(m.held for m in mine))
        want = Capacity(len(arrivals), self._wanted_blocks(arrivals, others))
        peak = self.note(now, Capacity(have.slots + want.slots, have.blocks + want.blocks))
        if not peak.slots:
            return None
        prompts = any(m.prefilling for m in others) or bool(arrivals)
        plan = PreemptionPlan(paused=self._paused(mine, prompts))
        short = Capacity(want.slots - free.slots, want.blocks + used - free.blocks)
        victims = self._victims(mine, short)
        plan.preempt = [m.request for m in victims]
        resumable = [*reversed(victims), *(m for m in new_mine if m.preempted_before)]
        new = [m for m in new_mine if not m.preempted_before]
        recomputing = any(m.prefilling and m.preempted_before for m in mine)
        if (resumable or new) and not victims and not recomputing:
            # One at a time: each is computed again from its prompt on.
            candidates = resumable or new
            if self._has_right_to_slot(candidates[0], mine, free, used):
                plan.front = [candidates.pop(0).request]
            elif resumable and not want.slots and self._has_room(candidates[0], mine, peak, used):
                new = [*new, resumable.pop(0)]
        plan.back = [m.request for m in new]
        plan.held = [m.request for m in resumable]
        return plan

    @staticmethod
    def _wanted_blocks(arrivals: Sequence[Member], others: Sequence[Member]) -> int:
        """Blocks for the waiting requests, and for the prompts of running ones that are not computed yet."""
        return sum(m.needed for m in arrivals) + sum(m.needed - m.held for m in others if m.prefilling)

    def _has_right_to_slot(self, member: Member, mine: Sequence[Member], free: Capacity, used: int) -> bool:
        return len(mine) < self._reserved and free.slots > 0 and free.blocks > member.needed + used

    def _has_room(self, member: Member, mine: Sequence[Member], peak: Capacity, used: int) -> bool:
        blocks = sum(m.held for m in mine) + member.needed
        slots_left, blocks_left = self._capacity.slots - peak.slots, self._capacity.blocks - peak.blocks - used - 1
        return len(mine) + 1 <= slots_left and blocks <= blocks_left

    def _paused(self, mine: Sequence[Member], prompts: bool) -> list[Any]:
        """Best-effort prompts pause while other prompts are there, but for one step in 1 / `best_effort_share`."""
        prefilling = [m.request for m in mine if m.prefilling]
        if not (prompts and prefilling):
            return []
        self._paused_steps = (self._paused_steps + 1) % SLACK.steps_per_turn
        return prefilling if self._paused_steps else []

    def _victims(self, mine: Sequence[Member], short: Capacity) -> list[Member]:
        """Return the newest decoding best-effort requests whose slots and blocks cover what is ``short``."""
        victims: list[Member] = []
        freed = 0
        for member in reversed([m for m in mine if not m.prefilling]):
            if len(victims) >= short.slots and freed >= short.blocks:
                break
            if len(mine) - len(victims) <= self._reserved:
                break
            victims.append(member)
            freed += member.held
        return victims


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
