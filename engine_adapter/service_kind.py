"""What a request was promised: policies, step gates and vLLM's scheduler class branch on this."""

from __future__ import annotations

from enum import IntEnum


class ServiceKind(IntEnum):
    """What the scheduler must keep for a request. Numbers, so that the kinds of a queue fit in an array."""

    PACED = 0
    """A pace: seconds per output token, from a TPOT or an end-to-end bound."""

    DEADLINE_ONLY = 1
    """A first-token deadline and no pace. It may sit out steps, but keeps its slot and its memory."""

    BEST_EFFORT = 2
    """Nothing: no bound, or bounds that the class waived. It may sit out steps, and may be preempted for the others."""

    YIELDING = 3
    """Paced or deadline-only, of a tenant above its share. It keeps what the others leave: its prompt waits for
    theirs, it sits out steps when their tokens need the time, and it may be preempted for them."""

    @property
    def label(self) -> str:
        """The name on the wire and in metrics."""
        # NOTE: `name` is a property, which calls three functions.
        return self._name_.lower()


KINDS_BY_LABEL = {kind.label: kind for kind in ServiceKind}


def default_kind(pace_s: float | None) -> ServiceKind:
    """Return the kind of a request that states none: paced if it has a pace, else best-effort."""
    return ServiceKind.BEST_EFFORT if pace_s is None else ServiceKind.PACED
