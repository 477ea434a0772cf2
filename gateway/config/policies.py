"""Sections of the scheduling policy, of shadow policies and of the SLO classes."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from gateway.config.section import Name, PositiveMs, Section
from gateway.policies.registry import OPTION_ALIASES, make_policy
from gateway.requests.slo import Slo
from gateway.scheduling.routing import make_routing

PolicyOptions = dict[str, bool | int | float | str]


def _checked_options(policy: str, options: PolicyOptions) -> PolicyOptions:
    """Check ``options`` and return them under their current names.

    `make_policy` issues the deprecation warning here, once per file: later calls get the current names.
    """
    make_policy(policy, dict(options))
    return {OPTION_ALIASES.get(option, option): value for option, value in options.items()}


class PolicyConfig(Section):
    """The scheduling policy and its options."""

    name: str = "slack"
    options: PolicyOptions = Field(default_factory=dict)

    @model_validator(mode="after")
    def _is_valid(self) -> PolicyConfig:
        self.options = _checked_options(self.name, self.options)
        return self


class RoutingConfig(Section):
    """How an engine is chosen for a request (docs/routing.md)."""

    name: str = "least_load"

    @model_validator(mode="after")
    def _is_valid(self) -> RoutingConfig:
        make_routing(self.name)
        return self


class ShadowConfig(Section):
    """A shadow policy and its options; a plain string is a policy without options (docs/shadow.md)."""

    name: str
    options: PolicyOptions = Field(default_factory=dict)
    label: Name | None = Field(None, description="Label in metrics; the policy's name by default.")

    @model_validator(mode="before")
    @classmethod
    def _from_plain_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _is_valid(self) -> ShadowConfig:
        self.options = _checked_options(self.name, self.options)
        return self


class SloClassConfig(Section):
    """A class's default bounds, its queue limit, and the treatment of requests with an unattainable bound."""

    ttft_ms: PositiveMs | None = None
    tpot_ms: PositiveMs | None = None
    e2e_ms: PositiveMs | None = None
    max_waiting: int = Field(1024, ge=1, le=1_000_000)
    on_unattainable: Literal["reject", "best_effort"] = "reject"

    def slo(self) -> Slo:
        """Return the bounds in seconds."""

        def seconds(ms: float | None) -> float | None:
            return None if ms is None else ms / 1000

        return Slo(seconds(self.ttft_ms), seconds(self.tpot_ms), seconds(self.e2e_ms))
