"""Policies by name, and the option names of earlier versions."""

from __future__ import annotations

import pytest

from gateway.policies.registry import OPTION_ALIASES, REMOVED_OPTIONS, make_policy
from gateway.policies.slack.policy import Slack


@pytest.mark.parametrize(("old", "new"), OPTION_ALIASES.items())
def test_old_option_name_works_with_a_warning(old: str, new: str) -> None:
    with pytest.warns(FutureWarning, match=f"option '{old}' is now '{new}'"):
        policy = make_policy("slack", {old: 0.25})
    assert policy == Slack(**{new: 0.25})


@pytest.mark.parametrize("option", sorted(REMOVED_OPTIONS))
def test_removed_option_is_ignored_with_a_warning(option: str) -> None:
    with pytest.warns(FutureWarning, match=f"option '{option}' has no effect any more"):
        policy = make_policy("slack", {option: 0.25, "cost_weight": 2.0})
    assert policy == Slack(cost_weight=2.0)
    with pytest.raises(ValueError, match=f"has no option '{option}'"):
        make_policy("fcfs", {option: 0.25})


@pytest.mark.parametrize("policy", ["s3", "scorpio", "annealing"])
def test_old_lookahead_name_works_in_every_policy(policy: str) -> None:
    with pytest.warns(FutureWarning):
        assert make_policy(policy, {"runway_steps": 3}) == make_policy(policy, {"prefill_lookahead_steps": 3})


def test_old_and_new_name_together_are_rejected() -> None:
    with pytest.raises(ValueError, match="are the same option"), pytest.warns(FutureWarning):
        make_policy("slack", {"thrift": 1, "cost_weight": 2})
