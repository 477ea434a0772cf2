"""The policies by name, as a configuration file names them."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from gateway.policies.annealing.policy import Annealing
from gateway.policies.base import Policy
from gateway.policies.fcfs import Fcfs
from gateway.policies.mooncake import Mooncake
from gateway.policies.s3 import S3
from gateway.policies.scorpio import Scorpio
from gateway.policies.slack.policy import Slack

_Kind = type[Fcfs] | type[S3] | type[Mooncake] | type[Scorpio] | type[Annealing] | type[Slack]

POLICIES: dict[str, tuple[_Kind, dict[str, Any]]] = {
    "fcfs": (Fcfs, {}),
    "s3": (S3, {}),
    "mooncake": (Mooncake, {}),
    "scorpio": (Scorpio, {}),
    "annealing": (Annealing, {}),
    "slack": (Slack, {}),
    "ttft_guard_only": (Scorpio, {"tpot_guard": False}),
    "tpot_guard_only": (Scorpio, {"ttft_guard": False}),
}
"""Each name's policy, and the options that make it what its name says."""


def make_policy(name: str, options: dict[str, Any] | None = None) -> Policy:
    """The policy called ``name`` with its ``options``; ValueError names what is wrong and what would be right."""
    if name not in POLICIES:
        raise ValueError(f"no policy is called {name!r}; choose one of {', '.join(POLICIES)}")
    options = options or {}
    kind, fixed = POLICIES[name]
    known = {f.name for f in dataclasses.fields(kind) if f.init} - {"name", "gate"} - fixed.keys()
    unknown = sorted(options.keys() - known)
    if unknown:
        takes = ", ".join(sorted(known)) or "none"
        raise ValueError(f"policy {name!r} has no option {unknown[0]!r}; its options: {takes}")
    policy = kind()
    for option, value in options.items():
        _check_option(option, value, getattr(policy, option))
    return kind(**fixed, **options, name=name)


def _check_option(option: str, value: Any, default: Any) -> None:
    """A wrong type would surface only when the policy first decides; every number in a policy is at least 0."""
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise ValueError(f"{option} must be true or false, but it is {value!r}")
    elif isinstance(default, int | float) and (
        isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf
    ):
        raise ValueError(f"{option} must be a number of at least 0, but it is {value!r}")
