"""What every policy guarantees, and the errors for a wrong policy or option."""

from __future__ import annotations

import copy
import math
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.policies.base import Decision, prefill_backlog
from gateway.policies.registry import POLICIES, make_policy
from gateway.requests.request import Request
from tests.fixtures.policy_builders import NOW, admitted, decide, engine, make_request, rejected, running

WAITING = st.lists(
    st.builds(
        lambda number, at, ttft, tpot, e2e, prompt, output, sequences, waived: make_request(
            f"w{number}", at=NOW - at, ttft=ttft, tpot=tpot, e2e=e2e, prompt=prompt, output=output,
            sequences=sequences, bounds_waived=waived,
        ),
        st.integers(0, 10**9), st.floats(0, 5), st.none() | st.floats(1e-6, 20), st.none() | st.floats(1e-6, 2),
        st.none() | st.floats(1e-6, 60), st.integers(1, 5000), st.floats(1, 3000), st.integers(1, 4), st.booleans(),
    ),
    max_size=12, unique_by=lambda r: r.id,
)  # fmt: skip

RUNNING = st.lists(
    st.builds(
        lambda tpot, prompt, done: running(tpot=tpot, prompt=prompt, generated=done),
        st.none() | st.floats(0.01, 1), st.integers(1, 4000), st.integers(1, 500),
    ),
    max_size=12,
)  # fmt: skip


def fields(requests: list[Request]) -> list[list[Any]]:
    return copy.deepcopy([[getattr(request, name) for name in Request.__slots__] for request in requests])


@pytest.mark.parametrize("name", POLICIES)
@given(waiting=WAITING, old=RUNNING, seqs=st.integers(1, 20), flags=st.tuples(st.booleans(), st.booleans()))
def test_policy_is_deterministic_and_changes_no_request(
    name: str, waiting: list[Request], old: list[Request], seqs: int, flags: tuple[bool, bool]
) -> None:
    options = {"ttft_guard": flags[0], "tpot_guard": flags[1]} if name == "scorpio" else {}
    policy, state = make_policy(name, options), engine(max_num_seqs=seqs)
    before = fields([*waiting, *old])
    first, second = decide(policy, NOW, waiting, old, state), decide(policy, NOW, list(waiting), list(old), state)
    assert first == second
    assert fields([*waiting, *old]) == before
    assert_valid(first, waiting)
    if name == "scorpio" and first.admit:
        size = len(old) + sum(r.sequences for r in first.admit)
        assert size <= max(seqs, first.admit[0].sequences if not old else 0)
        assert not any(r.request.bounds_waived for r in first.reject)


def assert_valid(decision: Decision, waiting: list[Request]) -> None:
    """Each waiting request is admitted or rejected at most once; a rejection names a bound that is not stricter."""
    decided = [*admitted(decision), *rejected(decision)]
    assert len(set(decided)) == len(decided)
    assert set(decided) <= {r.id for r in waiting}
    for rejection in decision.reject:
        numbers = (rejection.predicted_s, rejection.attainable_s, rejection.retry_after_s)
        assert all(math.isfinite(number) and number >= 0 for number in numbers)
        bound_s = getattr(rejection.request.slo, f"{rejection.bound}_s")
        assert rejection.attainable_s >= bound_s * 0.999


def test_prefill_backlog_counts_admitted_requests_without_first_token() -> None:
    assert prefill_backlog(
        [make_request(prompt=200), running(prompt=500), make_request(prompt=100)], engine()
    ) == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("best", {}, "no policy is called 'best'; choose one of fcfs"),
        ("scorpio", {"etta": 1}, "has no option 'etta'; did you mean 'eta'?"),
        ("fcfs", {"eta": 1}, "its options: none"),
        ("scorpio", {"name": "x"}, "has no option 'name'; its options: eta,"),
        ("slack", {"_granted": 1}, "has no option '_granted'; its options: cost_weight, max_wait_s,"),
        ("scorpio", {"eta": "much"}, "eta must be a number"),
        ("scorpio", {"eta": math.nan}, "eta must be a number"),
        ("scorpio", {"slack_s": -1}, "slack_s must be a number"),
        ("scorpio", {"eta": True}, "eta must be a number"),
        ("scorpio", {"ttft_guard": "yes"}, "ttft_guard must be true or false"),
    ],
)
def test_make_policy_error_says_what_is_accepted(name: str, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make_policy(name, options)
