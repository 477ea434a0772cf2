"""Whether a step prefills or decodes a request, by the one rule of vLLM's scheduler and the simulated one.

vLLM has no phases: a request's computed tokens catch up with its tokens. All tokens of a preempted request are computed
again, its output included, in chunks like a prompt.
"""

from __future__ import annotations


def tokens_left(tokens: int, computed: int, in_flight: int = 0) -> int:
    """Return the tokens of a request that remain to be computed.

    Args:
        tokens: the prompt, and the output that is known.
        computed: tokens whose step is scheduled or done.
        in_flight: output of scheduled steps that is not known yet, rejected drafts included.
    """
    return tokens + in_flight - computed


def is_prefilling(left: int, computed: int, prompt: int) -> bool:
    """Whether the next step computes a chunk, rather than the latest token, of which the next one is sampled."""
    return left > 1 or computed < prompt
