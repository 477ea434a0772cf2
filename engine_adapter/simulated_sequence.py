"""One sequence of tokens inside the simulated engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(slots=True, eq=False)
class SimulatedSequence:
    """One sequence in the simulated engine. Lengths in tokens; ``tpot_slo_s`` as in `step_gate.Decoding`.

    ``on_token(generated, at)`` is called at the end of each step that gave it a token; ``on_lost`` when the
    engine dies under it. ``abandoned`` is set by the app when nobody waits for it any more.
    """

    request_id: str
    prompt_tokens: int
    output_tokens: int
    tpot_slo_s: float | None
    on_token: Callable[[int, float], None]
    on_lost: Callable[[], None]
    prefilled: int = 0
    generated: int = 0
    abandoned: bool = False

    @property
    def reserved(self) -> int:
        """KV tokens set aside for it on admission: its whole life, so that nothing is ever preempted."""
        return self.prompt_tokens + self.output_tokens
