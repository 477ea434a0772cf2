"""One run as a JSON object, with the same keys for simulated and measured runs, so that both can be compared.

Rates are fractions of **all** requests; rejected and failed requests stay in the denominator. Violations count finished
requests that missed that bound. Quantiles are over finished requests. Goodput is attained requests per second of the
run, drain included.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from lab.workload import WorkloadRequest

Outcome = Literal["finished", "rejected", "failed"]


@dataclass(slots=True)
class RequestResult:
    """Outcome and latencies of one request. Times are in seconds from its due time.

    Attributes:
        ttft_s: None if no first token arrived.
        tpot_s: 0 for an answer of at most one token.
        e2e_s: None if no last token arrived.
        late_s: delay between the due time and the time at which the load client sent the request.
        reason: why the request was rejected or failed.
    """

    request: WorkloadRequest
    outcome: Outcome
    ttft_s: float | None = None
    tpot_s: float = 0.0
    e2e_s: float | None = None
    late_s: float = 0.0
    reason: str = ""

    @property
    def ttft_violated(self) -> bool:
        """Finished, but the first token was late or never observed."""
        return self.outcome == "finished" and (self.ttft_s is None or self.ttft_s > self.request.ttft_slo_s)

    @property
    def tpot_violated(self) -> bool:
        """Finished, but TPOT exceeded its bound."""
        return self.outcome == "finished" and self.tpot_s > self.request.tpot_slo_s

    @property
    def e2e_violated(self) -> bool:
        """Finished, but the last token was late or never observed."""
        return self.outcome == "finished" and (self.e2e_s is None or self.e2e_s > self.request.e2e_slo_s)

    @property
    def attained(self) -> bool:
        """Finished within every bound."""
        violated = self.ttft_violated or self.tpot_violated or self.e2e_violated
        return self.outcome == "finished" and not violated


def run_record(
    policy: str,
    qps: float,
    seed: int,
    results: Sequence[RequestResult],
    duration_s: float,
    *,
    wall_s: float,
    scheduling_s: float | None = None,
    bounds: tuple[float, float] | None = None,
    **extra: Any,
) -> dict[str, Any]:
    """Return the metrics of one run, ready for ``json.dumps``. Unknown values are None.

    Args:
        policy: the policy that served the run, or a label for the server.
        qps: offered rate (1/s).
        seed: seed of the workload.
        results: one result per request of the workload.
        duration_s: seconds from the start to the last answer, in simulated or real time.
        wall_s: wall-clock seconds of the run.
        scheduling_s: seconds spent in policy decisions: CPU time of a simulation, or wall-clock time.
        bounds: count bound and fair bound on adherence (`lab.bounds`).
        extra: further members, added unchanged.

    Raises:
        ValueError: no requests.
    """
    if not results:
        raise ValueError("a run record needs at least one request")
    attained = sum(result.attained for result in results)
    classes = sorted({result.request.category for result in results})
    return {
        "policy": policy,
        "qps": _rounded(qps, 4),
        "seed": seed,
        "requests": len(results),
        "duration_s": _rounded(duration_s, 3),
        "goodput": _rounded(attained / duration_s if duration_s > 0 else None, 4),
        **_shares(results),
        **_quantiles(results),
        "per_class": {str(c): _class_record([r for r in results if r.request.category == c]) for c in classes},
        "count_bound": _rounded(bounds[0] if bounds else None, 4),
        "fair_bound": _rounded(bounds[1] if bounds else None, 4),
        "scheduling_s": _rounded(scheduling_s, 4),
        "wall_s": _rounded(wall_s, 3),
        **extra,
    }


def _class_record(results: list[RequestResult]) -> dict[str, Any]:
    return {"requests": len(results), **_shares(results), **_quantiles(results)}


def _shares(results: Sequence[RequestResult]) -> dict[str, float | None]:
    def share(predicate: Callable[[RequestResult], bool]) -> float | None:
        return _rounded(sum(map(predicate, results)) / len(results), 4)

    return {
        "slo_adherence": share(lambda result: result.attained),
        "finished": share(lambda result: result.outcome == "finished"),
        "rejected": share(lambda result: result.outcome == "rejected"),
        "failed": share(lambda result: result.outcome == "failed"),
        "ttft_violations": share(lambda result: result.ttft_violated),
        "tpot_violations": share(lambda result: result.tpot_violated),
        "e2e_violations": share(lambda result: result.e2e_violated),
    }


def _quantiles(results: Sequence[RequestResult]) -> dict[str, float | None]:
    finished = [result for result in results if result.outcome == "finished"]
    ttft = [result.ttft_s for result in finished if result.ttft_s is not None]
    tpot = [result.tpot_s for result in finished]
    e2e = [result.e2e_s for result in finished if result.e2e_s is not None]
    return {
        "ttft_p50_s": quantile(ttft, 0.5),
        "ttft_p99_s": quantile(ttft, 0.99),
        "tpot_p50_s": quantile(tpot, 0.5),
        "tpot_p99_s": quantile(tpot, 0.99),
        "e2e_p50_s": quantile(e2e, 0.5),
        "e2e_p99_s": quantile(e2e, 0.99),
    }


def quantile(values: Sequence[float], q: float) -> float | None:
    """Return the ``q`` quantile (0 to 1) of ``values`` (s), rounded to 0.01 ms; None if there are no values."""
    return _rounded(float(np.quantile(values, q)), 5) if values else None


def _rounded(value: float | None, digits: int) -> float | None:
    # NOTE: JSON has no NaN and no infinity.
    return None if value is None or not math.isfinite(value) else round(float(value), digits)
