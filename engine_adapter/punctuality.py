"""By how much to outpace TPOT bounds, so that answers are on time though steps vary.

Whoever paces an answer exactly by its bound P is late with every other one: steps take what they take, and it ends a
little before or a little after. So answers are paced by ``share`` * P, with a share that is learnt from those that
ended: it falls with each that was late, and rises with each that was not,

    share -= GAIN * (1 - LATE)   after one that was late,       share += GAIN * LATE   after one that was on time,

which stands still when a `LATE` part of them is late (quantile tracking, Robbins and Monro 1951). Where steps take what
is expected, none is late and the share stays 1.
"""

from __future__ import annotations

from dataclasses import dataclass

LATE = 0.01
"""The part of answers that may be late."""

GAIN = 0.005
"""Of a bound: how far the share moves."""

LEAST = 0.9
"""The least share. An answer later than 1/`LEAST` of its bound was not late for want of it, and tells nothing."""


@dataclass(slots=True)
class Punctuality:
    """What became of the answers of one engine."""

    share: float = 1.0

    def note(self, tpot_s: float, bound_s: float) -> None:
        """An answer ended that took ``tpot_s`` seconds a token, where ``bound_s`` were allowed."""
        if tpot_s * LEAST > bound_s:
            return
        if tpot_s > bound_s:
            self.share = max(LEAST, self.share - GAIN * (1 - LATE))
        else:
            self.share = min(1.0, self.share + GAIN * LATE)
