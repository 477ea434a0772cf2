"""The load of an engine, as its policy counts it. The router sends a request to the engine with the least.

Under `annealing` the next request goes to the engine with the most KV memory left (arXiv 2504.14966, algorithm 2). The
paper assigns a batch of requests to its engines; here requests are assigned one by one as they arrive. Under other
policies the load is seconds of prefill work, its own included.
"""

from __future__ import annotations

import zlib

from gateway.policies.annealing.policy import Annealing
from gateway.requests.request import Request
from gateway.scheduling.admission import AdmissionController


def load(admission: AdmissionController, request: Request) -> tuple[float, int]:
    """Return the load of an engine that would get ``request`` too: prefill work (s), and the number of requests.

    Under `annealing` the first is KV memory (tokens, negative while some is left). What the engine has of the prompt in
    its prefix cache is no work, so a chat returns to the engine that knows it, unless the others have less to do.
    """
    if not isinstance(admission.policy, Annealing):
        work_s, count = admission.load()
        return work_s + admission.prefill_s(request), count
    requests = [*admission.running.values(), *admission.waiting]
    return sum([kv_tokens(other) for other in requests]) - admission.engine.kv_tokens, len(requests)


def kv_tokens(request: Request) -> float:
    """Return the KV memory (tokens) of ``request`` at its predicted length."""
    return (request.prompt_tokens + request.predicted_tokens) * request.sequences


def keeps_share(request: Request, share: float) -> bool:
    """Whether an engine that should keep only this ``share`` (0 to 1) of its requests keeps ``request``.

    It depends on the request's random id alone, so it is the same each time that the request is placed.
    """
    return share >= 1 or zlib.crc32(request.id.encode()) < share * 2**32
