"""The load of an engine, as its policy counts it. The router sends a request to the engine with the least.

Under `annealing` the next request goes to the engine with the most KV memory left (arXiv 2504.14966, algorithm 2). The
paper assigns a batch of requests to its engines; here requests are assigned one by one as they arrive.

Under other policies the load is seconds of prefill work, its own included: the predicted TTFT. Estimates of equal
engines are never equal, so the one that is predicted to be slightly faster would get every request. Therefore loads
that differ by less than the error of the estimates are equal, and the number of requests decides.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from typing import NamedTuple

from gateway.policies.annealing.policy import Annealing
from gateway.requests.request import Request
from gateway.scheduling.admission import AdmissionController


class Load(NamedTuple):
    """The load of an engine that would get one more request.

    ``work``: prefill work (s), or KV memory (tokens, negative while some is left) under `annealing`. ``requests``: the
    requests that the engine has. ``error``: expected error of ``work``.
    """

    work: float
    requests: int
    error: float = 0.0


def load(admission: AdmissionController, request: Request, now: float, passed_over: int = 0) -> Load:
    """Return the load at ``now`` (monotonic s) of an engine that would get ``request`` too.

    What the engine has of the prompt in its prefix cache is no work, so a chat returns to the engine that knows it,
    unless the others have less to do. The error is one step, because requests begin with a step, and the error of the
    prefill fit.

    An estimate that no request tests goes out of date. The prompt counts less with each of the ``passed_over`` requests
    that other engines got since the engine's last one, until as many as the model has samples make it count as nothing.
    So the engine is tried again, unless the request would probably miss its deadline there.
    """
    if not isinstance(admission.policy, Annealing):
        work_s, count = admission.expected_batch(now).prefill_s, requests_of(admission)
        model = admission.engine.step_time
        own_s = admission.prefill_s(request)
        error_s = model.curve.step_s(1 + len(admission.running), 0)
        if model.prefill_quality is not None:
            error_s += model.prefill_quality.mape * own_s
        known = 1.0
        if now + work_s + own_s <= request.deadline_s:
            known = max(0.0, 1 - passed_over / model.window)
        return Load(work_s + known * own_s, count, error_s)
    return free_memory_load(admission, now)


def free_memory_load(admission: AdmissionController, now: float) -> Load:
    """Return the KV memory (tokens) that an engine's requests need at ``now`` (monotonic s) beyond its own."""
    memory = admission.expected_batch(now).memory
    return Load(memory - admission.engine.kv_tokens, requests_of(admission))


def requests_of(admission: AdmissionController) -> int:
    """Return the requests that an engine has, and the sequences that others than this gateway have there."""
    return len(admission.running) + len(admission.waiting) + admission.engine.foreign_sequences


def ranks(loads: Sequence[Load]) -> list[tuple[bool, float, float]]:
    """Return a sort key for each of ``loads``; the best engine has the smallest.

    Loads that equal the least one within their errors come first, by the number of requests and then by work. The
    others follow by work.
    """
    least = min(loads)
    near = [one.work - least.work <= math.hypot(one.error, least.error) for one in loads]
    return [
        (False, one.requests, one.work) if equal else (True, one.work, one.requests)
        for one, equal in zip(loads, near, strict=True)
    ]


def keeps_share(request: Request, share: float) -> bool:
    """Whether an engine that should keep only this ``share`` (0 to 1) of its requests keeps ``request``.

    It depends on the request's random id alone, so it is the same each time that the request is placed.
    """
    return share >= 1 or zlib.crc32(request.id.encode()) < share * 2**32
