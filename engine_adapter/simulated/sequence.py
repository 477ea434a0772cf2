"""One sequence of tokens inside a simulated engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from engine_adapter.service_kind import ServiceKind, default_kind


def _nobody_listens(*_: object) -> None:
    pass


@dataclass(slots=True, eq=False)
class SimulatedSequence:
    """One sequence. Lengths in tokens; ``kind``, ``pace_s`` and ``gate`` as in `gates.base.Decoding`.

    ``on_token(generated, at)`` is called by the engine in real time at the end of each step that gave it a token;
    ``on_lost`` when that engine dies under it. ``abandoned`` is set by the app when nobody waits for it any more.

    ``length`` is its context: the prompt and what was generated. ``to_prefill`` of it must be computed before it
    decodes, ``prefilled`` is; after a preemption that is all over again. ``capacity`` is how long it may grow in the
    KV blocks that it holds. ``preemptible``: for those with a pace (`engine_adapter.gates.best_effort_preemption`).
    """

    request_id: str
    prompt_tokens: int
    output_tokens: int
    pace_s: float | None = None
    gate: str = ""
    kind: ServiceKind = None  # type: ignore[assignment]  # from the pace, in __post_init__
    on_token: Callable[[int, float], None] = _nobody_listens
    on_lost: Callable[[], None] = _nobody_listens
    abandoned: bool = False
    length: int = field(init=False)
    final_length: int = field(init=False)
    to_prefill: int = field(init=False)
    prefilled: int = 0
    capacity: int = 0
    preemptions: int = 0
    preemptible: bool = False

    def __post_init__(self) -> None:
        if self.kind is None:
            self.kind = default_kind(self.pace_s)
        self.length = self.to_prefill = self.prompt_tokens
        self.final_length = self.prompt_tokens + self.output_tokens

    @property
    def generated(self) -> int:
        """Output tokens so far."""
        return self.length - self.prompt_tokens
