"""`min_admission_share`: SLO classes whose requests are rejected too often go first."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_adapter.gates.constants import SLACK
from gateway.policies.base import Decision, Rejection, reject_ttft
from gateway.policies.slack.policy import ClassShares, Slack
from gateway.requests.request import Request
from tests.fixtures.policy_builders import NOW, admitted, decide, engine, make_request, running


def rejection(request: Request, infeasible: bool = False) -> Rejection:
    return reject_ttft(request, 1.0, 1.0, 0.1, infeasible)


def note(shares: ClassShares, *, admitted: int = 0, rejected: int = 0, **request: str) -> None:
    """Count decisions about requests with the given class."""
    for _ in range(admitted):
        shares.note(Decision(admit=[make_request(ttft=1.0, **request)]))
    for _ in range(rejected):
        shares.note(Decision(reject=[rejection(make_request(ttft=1.0, **request))]))


def behind(shares: ClassShares, min_share: float = 0.5, **request: str) -> bool:
    return bool(shares.behind([make_request(**request)], min_share)[0])


@given(outcomes=st.lists(st.tuples(st.sampled_from("ab"), st.booleans()), max_size=SLACK.fair_share_window))
def test_class_is_behind_below_a_fraction_of_the_overall_share(outcomes: list[tuple[str, bool]]) -> None:
    shares = ClassShares()
    for name, ok in outcomes:
        note(shares, admitted=ok, rejected=not ok, slo_class=name)
    overall = [ok for _, ok in outcomes]
    expected = []
    for name in "ab":
        own = [ok for of, ok in outcomes if of == name]
        # In integers: sum(own) / len(own) < 0.5 * sum(overall) / len(overall).
        expected.append(2 * sum(own) * len(overall) < sum(overall) * len(own))
        if 2 * sum(own) * len(overall) == sum(overall) * len(own) and own:
            return  # rounding decides
    found = shares.behind([make_request(slo_class=name) for name in "ab"], 0.5)
    assert found.tolist() == expected


def test_no_class_is_behind_without_a_minimum_share() -> None:
    shares = ClassShares()
    note(shares, admitted=50, slo_class="a")
    note(shares, rejected=50, slo_class="b")
    assert not behind(shares, 0.0, slo_class="b")


def test_old_decisions_fade_with_the_window() -> None:
    shares = ClassShares()
    note(shares, rejected=SLACK.fair_share_window, slo_class="b")
    note(shares, admitted=20 * SLACK.fair_share_window)
    # After k admissions the share of "b" is 1 - 0.98^k, which is 0.497 at k = 34 and 0.507 at k = 35.
    note(shares, admitted=34, slo_class="b")
    assert behind(shares, slo_class="b")
    note(shares, admitted=1, slo_class="b")
    assert not behind(shares, slo_class="b")


def test_infeasible_and_best_effort_requests_do_not_count() -> None:
    shares = ClassShares()
    shares.note(Decision(reject=[rejection(make_request(slo_class="b"), infeasible=True)]))
    waived = make_request(ttft=1.0, slo_class="b", bounds_waived=True)
    shares.note(Decision(admit=[waived, make_request(slo_class="b")]))
    assert shares == ClassShares()


def test_behind_has_one_answer_for_each_request() -> None:
    shares = ClassShares()
    assert shares.behind([], 0.5).tolist() == []
    assert shares.behind([make_request()], 0.5).tolist() == [False], "no request was decided yet"
    note(shares, admitted=9, slo_class="a")
    note(shares, rejected=1, slo_class="b")
    classes = ["a", "b", "new", "b"]
    assert shares.behind([make_request(slo_class=name) for name in classes], 0.5).tolist() == [False, True, False, True]


def test_expensive_class_gets_its_minimum_share() -> None:
    def shares(min_admission_share: float) -> tuple[float, float]:
        """Return the admission rates of two classes that compete for one slot."""
        policy, state = Slack(min_admission_share=min_admission_share), engine(max_num_seqs=1)
        admissions = {"cheap": 0, "expensive": 0}
        for turn in range(600):
            queue = [
                make_request(f"{turn} {name}", ttft=0.5, tpot=1, at=NOW + turn, output=output, slo_class=name)
                for name, output in (("cheap", 20), ("expensive", 900))
            ]
            decision = decide(policy, NOW + turn, queue, [], state)
            late = decide(policy, NOW + turn + 1, [r for r in queue if r not in decision.admit], [], state)
            assert len(late.reject) == 1
            for request in decision.admit:
                admissions[request.slo_class] += 1
        return admissions["cheap"] / 600, admissions["expensive"] / 600

    assert shares(min_admission_share=0.0) == (1.0, 0.0)
    cheap, expensive = shares(min_admission_share=0.5)
    assert expensive == pytest.approx(0.5 * (cheap + expensive) / 2, abs=0.02)


def test_request_of_a_class_behind_blocks_no_other_when_it_does_not_fit() -> None:
    policy = Slack()
    late = [make_request(f"late{i}", at=NOW - 9, ttft=1.0, tpot=1.0, slo_class="behind") for i in range(20)]
    decide(policy, NOW, [*late, *(make_request(str(i), ttft=9, tpot=1.0, prompt=5) for i in range(20))], [], engine())
    batch = [running(f"old{i}", tpot=0.02, prompt=10, output=1000) for i in range(30)]
    strict = make_request("strict", ttft=5, tpot=0.0125, slo_class="behind")
    loose, other = make_request("loose", ttft=9, tpot=0.5, prompt=5, slo_class="behind"), make_request("other", ttft=1)
    decision = decide(policy, NOW, [strict, loose, other], batch, engine())
    assert admitted(decision)[0] == "loose"
    assert "strict" not in admitted(decision)
