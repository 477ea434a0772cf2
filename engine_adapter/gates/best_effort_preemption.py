"""Who makes way in a full engine: requests without a pace to keep, for those with one.

While nobody else wants them, requests without a pace have all places of an engine and all of its KV memory. When others
come they sit out steps (`slack_gate`), which leaves time, but neither a place nor memory. So they are put aside: they
lose their memory and wait, behind everybody else; once there is room they are computed again with all that they had
generated, and go on from there. Of places, and likewise of blocks of KV memory, let there be B; b are taken or wanted
by requests with a pace, u taken by the others, of whom ``BEST_EFFORT_SHARE`` * B, the oldest, keep their places. Then

    b + u - B              are made free, by those who came last,
    B - peak b - u         are given back, to those who came first, one after the other,

with the peak of b over the latest seconds (`RecentPeak`): to compute again costs time, so it is not done for a moment.
Of the blocks, one for each that runs is left free besides: it may need one at once. While prompts of others are there,
the prompt of one without a pace rests; but no longer than `TURN` steps.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from engine_adapter.gates.slack import BEST_EFFORT_SHARE, TURN

PEAK_S = 10.0
"""Room that requests with a pace had taken is given away so many seconds later."""


class RecentPeak:
    """The most of a value that there was in the latest ``lasts_s`` seconds."""

    def __init__(self, lasts_s: float = PEAK_S) -> None:
        self._lasts_s = lasts_s
        self._falling: deque[tuple[float, float]] = deque()
        """When each value was noted that none after it has reached."""

    def note(self, now: float, value: float) -> float:
        """``value`` is what there is at ``now`` (s); answers the peak."""
        falling = self._falling
        while falling and falling[-1][1] <= value:
            falling.pop()
        falling.append((now, value))
        while falling[0][0] < now - self._lasts_s:
            falling.popleft()
        return falling[0][1]


@dataclass(slots=True, frozen=True)
class Room:
    """Places in the batch, and blocks of KV memory."""

    slots: int = 0
    blocks: int = 0


@dataclass(slots=True, frozen=True)
class Seen:
    """What a scheduler sees before a step.

    ``free``: what nobody has; ``others``: what those in the batch have who have no pace; ``wanted``: what those with
    one want beyond what they have. ``latest``: the blocks of each who could make way, who came last first.
    ``next_blocks``: what the first without a pace needs who waits for a place; None if there is nobody, or one is being
    computed again. ``prompts``: whether prompts of those with a pace are there, ``others_prompts`` of others.
    """

    free: Room
    others: Room
    wanted: Room = Room()
    latest: Sequence[int] = ()
    next_blocks: int | None = None
    prompts: bool = False
    others_prompts: bool = False


@dataclass(slots=True, frozen=True)
class Way:
    """Of those without a pace ``leaving`` make way now, and the next of those who wait ``goes_on``, or nobody.

    ``first``: it goes before those with a pace, for it has a right to its place. ``rest``: prompts of those without a
    pace rest in this step.
    """

    leaving: int = 0
    goes_on: bool = False
    first: bool = False
    rest: bool = False


class BestEffortPreemption:
    """Who makes way in an engine that has so much ``room``; keeps its peaks."""

    def __init__(self, room: Room) -> None:
        self._room = room
        self._keep = reserved_slots(room.slots)
        self._places, self._blocks = RecentPeak(), RecentPeak()
        self._rested = 0
        """Steps in a row that prompts have rested."""

    def note(self, now: float, paced: Room) -> Room:
        """``paced`` is what those with a pace have or want at ``now`` (s); answers the peak."""
        slots = self._places.note(now, min(paced.slots, self._room.slots))
        return Room(int(slots), int(self._blocks.note(now, min(paced.blocks, self._room.blocks))))

    def plan(self, now: float, seen: Seen) -> Way | None:
        """Decide for the step that begins at ``now`` (s). None: nobody with a pace was here lately, nothing changes."""
        free, others, wanted = seen.free, seen.others, seen.wanted
        running = self._room.slots - free.slots
        paced = Room(running - others.slots, self._room.blocks - free.blocks - others.blocks)
        peak = self.note(now, Room(paced.slots + wanted.slots, paced.blocks + wanted.blocks))
        if not peak.slots:
            return None
        short = Room(wanted.slots - free.slots, wanted.blocks + running - free.blocks)
        leaving = self._leaving(short, others.slots, seen.latest)
        rest = self._rests(seen)
        if leaving or seen.next_blocks is None:
            return Way(leaving, rest=rest)
        more = Room(others.slots + 1, others.blocks + seen.next_blocks)
        spare = Room(self._room.slots - peak.slots, self._room.blocks - peak.blocks - running - 1)
        fits = not wanted.slots and more.slots <= spare.slots and more.blocks <= spare.blocks
        first = more.slots <= self._keep and free.slots > 0 and free.blocks > seen.next_blocks + running
        return Way(goes_on=fits or first, first=first, rest=rest)

    def _rests(self, seen: Seen) -> bool:
        if not (seen.prompts and seen.others_prompts):
            return False
        self._rested = (self._rested + 1) % TURN
        return self._rested > 0

    def _leaving(self, short: Room, slots: int, latest: Sequence[int]) -> int:
        freed = 0
        for count, blocks in enumerate(latest):
            if (count >= short.slots and freed >= short.blocks) or slots - count <= self._keep:
                return count
            freed += blocks
        return len(latest)


def reserved_slots(slots: int) -> int:
    """Of so many, those that requests without a pace have however full the engine is."""
    return max(1, int(BEST_EFFORT_SHARE * slots))
