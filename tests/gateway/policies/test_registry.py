"""Policies by name, and the option names of earlier versions."""

from __future__ import annotations

import pytest

from gateway.policies.registry import OPTION_ALIASES, make_policy
from gateway.policies.slack.policy import Slack


@pytest.mark.parametrize(("old", "new"), OPTION_ALIASES.items())
def test_old_option_name_works_with_a_warning(old: str, new: str) -> None:
    with pytest.warns(FutureWarning, match=f"option '{old}' is now '{new}'"):
        policy = make_policy("slack", {old: 0.25})
    assert policy == Slack(**{new: 0.25})


@pytest.mark.parametrize("policy", ["s3", "scorpio", "annealing"])
def test_old_lookahead_name_works_in_every_policy(policy: str) -> None:
    with pytest.warns(FutureWarning):
        assert make_policy(policy, {"runway_steps": 3}) == make_policy(policy, {"prefill_lookahead_steps": 3})


def test_old_and_new_name_together_are_rejected() -> None:
    with pytest.raises(ValueError, match="are the same option"), pytest.warns(FutureWarning):
        make_policy("slack", {"thrift": 1, "cost_weight": 2})
