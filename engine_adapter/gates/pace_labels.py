"""Names of paces in the gate's counters (`GateReport.eligible`)."""

from __future__ import annotations

MAX_LABELS = 32
"""Paces that are counted apart. Clients choose paces freely, so the others are counted together as `OTHER`."""

OTHER = "other"


class PaceLabels:
    """Gives the first `MAX_LABELS` paces a label of their own."""

    def __init__(self) -> None:
        self._labels: set[str] = set()

    def of(self, pace_ms: float | None) -> str:
        """Return the label of a pace in milliseconds per token, or of no pace."""
        label = "none" if pace_ms is None else f"{pace_ms:g}"
        if label not in self._labels:
            if len(self._labels) >= MAX_LABELS:
                return OTHER
            self._labels.add(label)
        return label
