"""Policies by name, as a configuration file names them."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Sequence
from typing import Any

from engine_adapter.suggestion import did_you_mean
from gateway.policies.annealing.policy import Annealing
from gateway.policies.base import Policy
from gateway.policies.fcfs import Fcfs
from gateway.policies.mooncake import Mooncake
from gateway.policies.s3 import S3
from gateway.policies.scorpio import Scorpio
from gateway.policies.slack.policy import Slack

POLICIES: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "fcfs": (Fcfs, {}),
    "s3": (S3, {}),
    "mooncake": (Mooncake, {}),
    "scorpio": (Scorpio, {}),
    "annealing": (Annealing, {}),
    "slack": (Slack, {}),
    "ttft_guard_only": (Scorpio, {"tpot_guard": False}),
    "tpot_guard_only": (Scorpio, {"ttft_guard": False}),
}
"""Policy name to (dataclass, fixed options). Every field of the dataclass has a default, and one is ``name``."""

OPTION_ALIASES = {
    "thrift": "cost_weight",
    "floor": "min_admission_share",
    "optimism": "queue_discount",
    "patience_s": "max_wait_s",
    "runway_steps": "prefill_lookahead_steps",
}
"""Option names of version 0.1 to their names now. Accepted with a warning until version 0.3."""

REMOVED_OPTIONS = frozenset(("fill", "memory_risk", "tpot_target_fraction"))
"""Former options of `slack`, removed after an ablation. Ignored with a warning until version 0.3."""


class UnknownOption(ValueError):  # noqa: N818 - named after its cause
    """The policy has no such ``option``."""

    option = ""


def make_policy(name: str, options: dict[str, Any] | None = None) -> Policy:
    """Return the policy called ``name`` with its ``options``.

    Raises:
        UnknownOption: the policy has no such option.
        ValueError: an unknown policy, or a value of the wrong type. All messages say what is accepted.
    """
    if name not in POLICIES:
        raise ValueError(f"no policy is called {name!r}; choose one of {', '.join(POLICIES)}")
    options = _renamed(name, options or {})
    policy_class, fixed = POLICIES[name]
    known = {f.name for f in dataclasses.fields(policy_class) if f.init} - {"name", "gate"} - fixed.keys()
    unknown = sorted(options.keys() - known)
    if unknown:
        raise _unknown_option(name, unknown[0], sorted(known))
    policy = policy_class()
    for option, value in options.items():
        _check_option(option, value, getattr(policy, option))
    made: Policy = policy_class(**fixed, **options, name=name)
    return made


def _unknown_option(policy: str, option: str, known: Sequence[str]) -> UnknownOption:
    """Return the error for an ``option`` that is not ``known``. It names the most similar option, or else all."""
    advice = did_you_mean(option, known, "its options:")
    error = UnknownOption(f"policy {policy!r} has no option {option!r}; {advice}")
    error.option = option
    return error


def _renamed(policy: str, options: dict[str, Any]) -> dict[str, Any]:
    """``options`` with old names replaced and removed ones dropped; warns about each."""
    renamed = {}
    for option, value in options.items():
        current = OPTION_ALIASES.get(option, option)
        if current != option:
            # FutureWarning, because Python shows it to users by default.
            warnings.warn(f"policy {policy!r}: option {option!r} is now {current!r}", FutureWarning, stacklevel=3)
        if policy == "slack" and option in REMOVED_OPTIONS:
            warnings.warn(f"policy 'slack': option {option!r} has no effect any more", FutureWarning, stacklevel=3)
            continue
        if current in renamed or (current != option and current in options):
            raise ValueError(f"policy {policy!r}: {option!r} and {current!r} are the same option; keep {current!r}")
        renamed[current] = value
    return renamed


def _check_option(option: str, value: Any, default: Any) -> None:
    """Raise ValueError for a value of the wrong type, here rather than at the policy's first decision."""
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise ValueError(f"{option} must be true or false, but it is {value!r}")
    elif isinstance(default, int | float) and (
        isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf
    ):
        raise ValueError(f"{option} must be a number of at least 0, but it is {value!r}")
