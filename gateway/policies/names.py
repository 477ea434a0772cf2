"""The policies by name, as a configuration file names them."""

from __future__ import annotations

import dataclasses
from typing import Any

from gateway.policies.base import Policy
from gateway.policies.fcfs import Fcfs
from gateway.policies.scorpio import Scorpio

POLICIES: dict[str, type[Fcfs] | type[Scorpio]] = {"fcfs": Fcfs, "scorpio": Scorpio}


def make_policy(name: str, options: dict[str, Any] | None = None) -> Policy:
    """The policy called ``name`` with its ``options``; ValueError names what is wrong and what would be right."""
    if name not in POLICIES:
        raise ValueError(f"no policy is called {name!r}; choose one of {', '.join(POLICIES)}")
    options = options or {}
    known = {f.name for f in dataclasses.fields(POLICIES[name])} - {"name", "gated"}
    unknown = sorted(options.keys() - known)
    if unknown:
        takes = ", ".join(sorted(known)) or "none"
        raise ValueError(f"policy {name!r} has no option {unknown[0]!r}; its options: {takes}")
    return POLICIES[name](**options)
