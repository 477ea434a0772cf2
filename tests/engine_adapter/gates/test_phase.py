"""What remains to be computed: the same rule for vLLM's requests and simulated sequences."""

from __future__ import annotations

import pytest

from engine_adapter.gates.phase import is_prefilling, tokens_left
from engine_adapter.simulated.sequence import SimulatedSequence


@pytest.mark.parametrize(
    ("tokens", "computed", "in_flight", "prompt", "left", "prefilling"),
    [
        (100, 0, 0, 100, 100, True),
        (100, 99, 0, 100, 1, True),  # the last token of a prompt
        (1, 0, 0, 1, 1, True),
        (101, 100, 0, 100, 1, False),
        (101, 101, 1, 100, 1, False),  # the next token is not known yet
        (101, 104, 4, 100, 1, False),  # nor are three drafts beside it
        (180, 0, 0, 100, 180, True),  # preempted
        (180, 120, 0, 100, 60, True),  # all of its prompt is computed again, and some of its output
        (180, 179, 0, 100, 1, False),
    ],
)
def test_rule(tokens: int, computed: int, in_flight: int, prompt: int, left: int, prefilling: bool) -> None:
    assert tokens_left(tokens, computed, in_flight) == left
    assert is_prefilling(left, computed, prompt) == prefilling


def test_preempted_sequence_prefills_its_output_too() -> None:
    sequence = SimulatedSequence("r", 10, 50)
    sequence.length, sequence.computed = 40, 20
    assert (sequence.left, sequence.prefilling) == (20, True)
    sequence.computed = 39
    assert (sequence.left, sequence.prefilling) == (1, False)
