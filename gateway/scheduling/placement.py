"""Requests over several engines: each goes to the one with the most KV memory left (arXiv 2504.14966, its algorithm 2).

The paper maps a batch of requests; a gateway maps them one by one as they come in. Both are `place`: what runs and what
waits at an engine counts with the length that it is expected to reach. Ordering is then each engine's own business.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from gateway.policies.annealing.policy import Annealing
from gateway.requests.request import Request
from gateway.scheduling.admission import AdmissionController


def kv_tokens(request: Request) -> float:
    """KV memory (tokens) that ``request`` is expected to come to."""
    return (request.prompt_tokens + request.predicted_tokens) * request.sequences


def remaining(total: float, requests: Iterable[Request]) -> float:
    """What is left of ``total`` tokens beside ``requests``; below 0 where more wait than fit at once."""
    return total - sum([kv_tokens(request) for request in requests])


def assign(needs: Sequence[float], left: Sequence[float]) -> list[int]:
    """The engine of each request, in order: the one with the most memory left, the first among equals.

    ``needs``: tokens of each request, ``left``: of each engine. Raises ValueError without engines.
    """
    if not left:
        raise ValueError("there is no engine to place requests on")
    left = list(left)
    chosen = []
    for need in needs:
        engine = max(range(len(left)), key=left.__getitem__)
        left[engine] -= need
        chosen.append(engine)
    return chosen


def load(admission: AdmissionController) -> tuple[float, int]:
    """How much is ahead of a newcomer, to compare engines, as the policy there places requests: the least is next.

    `Annealing`: by KV memory. Others: by seconds of prefill work (`AdmissionController.load`).
    """
    if not isinstance(admission.policy, Annealing):
        return admission.load()
    held = [*admission.running.values(), *admission.waiting]
    return -remaining(admission.engine.kv_tokens, held), len(held)
