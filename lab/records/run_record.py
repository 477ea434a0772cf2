"""One run as a JSON object: the same keys whether it was simulated or measured, so that both can be laid side by side.

Rates are fractions of **all** requests: what was rejected or failed stays in the denominator. Violations count finished
requests that broke that bound. Quantiles are over finished requests. Goodput is attained requests per second of the
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
    """One request's fate. Times in seconds from the moment it was due.

    ``ttft_s`` and ``e2e_s`` are None when there was no first, or no last, token; ``tpot_s`` is 0 up to one token.
    ``late_s`` is by how much a load client missed the due moment; ``reason`` says why it was rejected or failed.
    """

    asked: WorkloadRequest
    outcome: Outcome
    ttft_s: float | None = None
    tpot_s: float = 0.0
    e2e_s: float | None = None
    late_s: float = 0.0
    reason: str = ""

    @property
    def ttft_violated(self) -> bool:
        """Finished, but the first token came too late, or nobody saw one."""
        return self.outcome == "finished" and (self.ttft_s is None or self.ttft_s > self.asked.ttft_slo_s)

    @property
    def tpot_violated(self) -> bool:
        """Finished, but the tokens came too slowly."""
        return self.outcome == "finished" and self.tpot_s > self.asked.tpot_slo_s

    @property
    def e2e_violated(self) -> bool:
        """Finished, but the last token came too late."""
        return self.outcome == "finished" and (self.e2e_s is None or self.e2e_s > self.asked.e2e_slo_s)

    @property
    def attained(self) -> bool:
        """Finished and every bound met."""
        late = self.ttft_violated or self.tpot_violated or self.e2e_violated
        return self.outcome == "finished" and not late


def run_record(
    policy: str,
    qps: float,
    seed: int,
    served: Sequence[RequestResult],
    duration_s: float,
    *,
    wall_s: float,
    scheduling_s: float | None = None,
    bounds: tuple[float, float] | None = None,
    **extra: Any,
) -> dict[str, Any]:
    """The figures of one run, ready for ``json.dumps``; what is not known is None.

    Args:
        policy: what served: a policy, or a label for the server.
        qps: the rate offered (1/s).
        seed: of the workload.
        served: one entry for each request of the workload.
        duration_s: from the start to the last answer, in the run's own time (simulated or real).
        wall_s: what the run took by the wall clock; ``scheduling_s``: how much of it went into decisions.
        bounds: count bound and fair bound on adherence (`lab.bounds`).
        extra: more members, added as they are.

    Raises:
        ValueError: no requests.
    """
    if not served:
        raise ValueError("a run without requests has no figures")
    attained = sum(one.attained for one in served)
    classes = sorted({one.asked.category for one in served})
    return {
        "policy": policy,
        "qps": _rounded(qps, 4),
        "seed": seed,
        "requests": len(served),
        "duration_s": _rounded(duration_s, 3),
        "goodput": _rounded(attained / duration_s if duration_s > 0 else None, 4),
        **_shares(served),
        **_quantiles(served),
        "per_class": {str(c): _class([one for one in served if one.asked.category == c]) for c in classes},
        "count_bound": _rounded(bounds[0] if bounds else None, 4),
        "fair_bound": _rounded(bounds[1] if bounds else None, 4),
        "scheduling_s": _rounded(scheduling_s, 4),
        "wall_s": _rounded(wall_s, 3),
        **extra,
    }


def _class(served: list[RequestResult]) -> dict[str, Any]:
    return {"requests": len(served), **_shares(served), **_quantiles(served)}


def _shares(served: Sequence[RequestResult]) -> dict[str, float | None]:
    def share(holds: Callable[[RequestResult], bool]) -> float | None:
        return _rounded(sum(map(holds, served)) / len(served), 4)

    return {
        "slo_adherence": share(lambda one: one.attained),
        "finished": share(lambda one: one.outcome == "finished"),
        "rejected": share(lambda one: one.outcome == "rejected"),
        "failed": share(lambda one: one.outcome == "failed"),
        "ttft_violations": share(lambda one: one.ttft_violated),
        "tpot_violations": share(lambda one: one.tpot_violated),
        "e2e_violations": share(lambda one: one.e2e_violated),
    }


def _quantiles(served: Sequence[RequestResult]) -> dict[str, float | None]:
    finished = [one for one in served if one.outcome == "finished"]
    ttft = [one.ttft_s for one in finished if one.ttft_s is not None]
    tpot = [one.tpot_s for one in finished]
    e2e = [one.e2e_s for one in finished if one.e2e_s is not None]
    return {
        "ttft_p50_s": quantile(ttft, 0.5),
        "ttft_p99_s": quantile(ttft, 0.99),
        "tpot_p50_s": quantile(tpot, 0.5),
        "tpot_p99_s": quantile(tpot, 0.99),
        "e2e_p50_s": quantile(e2e, 0.5),
        "e2e_p99_s": quantile(e2e, 0.99),
    }


def quantile(values: Sequence[float], q: float) -> float | None:
    """The ``q`` quantile (0 to 1) to 0.01 ms; None of nothing."""
    return _rounded(float(np.quantile(values, q)), 5) if values else None


def _rounded(value: float | None, digits: int) -> float | None:
    # JSON has no NaN and no infinity.
    return None if value is None or not math.isfinite(value) else round(float(value), digits)
