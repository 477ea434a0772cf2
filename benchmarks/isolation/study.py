"""Measures what one tenant can do to another: the victim's SLO adherence alone, and beside one kind of abuse each.

    python -m benchmarks.isolation.study --json docs/results/isolation.json
    python -m benchmarks.isolation.study --page docs/results/isolation.json
    python -m benchmarks.isolation.study --kind flood --seed 0

The victim offers 10 requests/s of the ShareGPT workload with the six SLO classes of the paper. The abuser offers 200/s
(`ABUSES`). Everything runs in virtual time (`lab.simulate`), so the results depend on the seeds alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Annotated, Any

import typer

from benchmarks import results_json
from benchmarks.command import Jobs, JsonTo, PageOf, write_page
from benchmarks.isolation.page import page, spread
from engine_adapter.step_time.profile import load_profile
from gateway.policies.registry import make_policy
from lab.simulate.predictions import PredictedLength, predict
from lab.simulate.simulator import simulate
from lab.workload import WorkloadRequest, make_workload

PROFILE = "a100-llama3.1-8b"
VICTIM_QPS, ABUSER_QPS = 10.0, 200.0
DURATION_S = 40.0
SEEDS = (0, 1, 2, 3, 4)
OTHER_POLICIES = ("fcfs", "mooncake", "scorpio")
OTHER_KINDS = ("flood",)

Change = Callable[[WorkloadRequest], WorkloadRequest]


@dataclass(frozen=True, slots=True)
class Abuse:
    """What the abuser sends: the ShareGPT workload, each request changed by ``change``.

    ``predicted``: the output length (tokens) that the abuser declares; None: the predictor's.
    """

    says: str
    change: Change = lambda request: request
    predicted: float | None = None
    mix: dict[int, float] | None = None


def _bounds(ttft_s: float, tpot_s: float, category: int = 7) -> Change:
    return lambda request: replace(request, ttft_slo_s=ttft_s, tpot_slo_s=tpot_s, category=category)


def _huge(request: WorkloadRequest) -> WorkloadRequest:
    return replace(request, prompt_tokens=4000, output_tokens=16, ttft_slo_s=10.0, category=7)


ABUSES = {
    "flood": Abuse("the victim's own classes, 20 times as many requests"),
    "class": Abuse("one class only: 1 s, 50 ms", mix={5: 1.0}),
    "patient": Abuse("deadlines of 60 s", _bounds(60.0, 0.05)),
    "tight": Abuse("bounds of 0.2 s and 20 ms", _bounds(0.2, 0.02)),
    "loose": Abuse("TPOT bounds of 200 ms", _bounds(2.0, 0.2)),
    "short": Abuse("declares 1 output token, takes about 270", predicted=1.0),
    "long": Abuse("declares 2,000 output tokens, takes about 270", predicted=2000.0),
    "prompts": Abuse("prompts of 4,000 tokens", _huge),
    "best_effort": Abuse("no bounds at all", _bounds(math.inf, math.inf)),
    "no_ttft": Abuse("no TTFT bound, 50 ms", _bounds(math.inf, 0.05)),
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """Adherence of the victim (0 to 1), and attained requests per second of the abuser."""

    victim: float
    abuser: float


def adherence(kind: str, seed: int, policy: str = "slack", shares: bool = True) -> Outcome:
    """Return what the victim and the abuser attain with the abuse ``kind``; "" for none.

    ``shares``: whether the policy knows that they are two tenants.
    """
    victim = make_workload("sharegpt", qps=VICTIM_QPS, duration_s=DURATION_S, seed=seed)
    merged = [("victim", one, length) for one, length in zip(victim, predict("shipped", victim, seed), strict=True)]
    if kind:
        abuse = ABUSES[kind]
        work = make_workload("sharegpt", qps=ABUSER_QPS, duration_s=DURATION_S, seed=seed + 1000, mix=abuse.mix)
        work = [abuse.change(one) for one in work]
        lengths = predict("shipped", work, seed + 1000)
        if abuse.predicted is not None:
            lengths = [PredictedLength(abuse.predicted, abuse.predicted)] * len(work)
        merged += [("abuser", one, length) for one, length in zip(work, lengths, strict=True)]
        merged.sort(key=lambda item: item[1].at_s)
    tenants = [tenant for tenant, _, _ in merged]
    workload, predictions = [one for _, one, _ in merged], [length for _, _, length in merged]
    result = simulate(
        workload,
        predictions,
        load_profile(PROFILE),
        lambda: make_policy(policy),
        tenants=tenants if shares else None,
        seed=seed,
    )
    attained = {"victim": 0, "abuser": 0}
    for one, tenant in zip(result.results, tenants, strict=True):
        attained[tenant] += one.attained
    return Outcome(attained["victim"] / len(victim), attained["abuser"] / DURATION_S)


@dataclass(frozen=True, slots=True)
class _Case:
    policy: str
    shares: bool
    kind: str
    seed: int

    def run(self) -> dict[str, Any]:
        """Return the case and its outcome as a record."""
        found = adherence(self.kind, self.seed, self.policy, self.shares)
        return {**asdict(self), "victim": round(found.victim, 4), "abuser": round(found.abuser, 2)}


def cases(kinds: Sequence[str], seeds: Sequence[int], others: Sequence[str] = OTHER_POLICIES) -> list[_Case]:
    """Return the runs: `slack` with and without shares, and some kinds under ``others``."""
    found = [_Case("slack", shares, *one) for shares in (True, False) for one in product(["", *kinds], seeds)]
    some = [kind for kind in ("", *OTHER_KINDS) if not kind or kind in kinds]
    return found + [_Case(policy, True, *one) for policy in others for one in product(some, seeds)]


def main(
    kind: Annotated[list[str] | None, typer.Option(help="Only these kinds of abuse, and only `slack`.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Seeds.")] = None,
    jobs: Jobs = 2,
    json_path: JsonTo = None,
    page_of: PageOf = None,
) -> None:
    """Measure the victim's adherence alone and beside each kind of abuse."""
    if page_of is not None:
        write_page(page_of, page)
        return
    seeds = seed or SEEDS
    with ProcessPoolExecutor(jobs) as pool:
        runs = list(pool.map(_Case.run, cases(kind or list(ABUSES), seeds, () if kind else OTHER_POLICIES)))
    if json_path is not None:
        results_json.write({"seeds": list(seeds), "runs": runs}, json_path)
    for policy, shares in dict.fromkeys((run["policy"], run["shares"]) for run in runs):
        print(policy, "with shares" if shares else "without shares")
        for one in dict.fromkeys(run["kind"] for run in runs):
            own = [r for r in runs if (r["policy"], r["shares"], r["kind"]) == (policy, shares, one)]
            if own:
                print(f"  {one or 'alone':12} {spread(own, 'victim', 3)}")


if __name__ == "__main__":
    typer.run(main)
