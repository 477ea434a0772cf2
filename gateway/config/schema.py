"""Schema of the configuration file. Each subject has a module of its own; this one joins the sections.

Latency bounds are in milliseconds, as in the request headers; other durations are in seconds. `gateway.config.file`
loads the file and adds line numbers to validation errors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import Field, model_validator

from gateway.api.addresses import is_loopback
from gateway.api.auth import ApiKey
from gateway.api.body_fields import FieldGuard
from gateway.config.engines import EngineConfig, FailoverConfig, HttpEngineConfig, PredictorConfig
from gateway.config.keys import KeyConfig
from gateway.config.observability import DecisionsConfig, LoggingConfig, TracingConfig
from gateway.config.policies import PolicyConfig, ShadowConfig, SloClassConfig
from gateway.config.section import Name, Section
from gateway.config.server import LimitsConfig, ServerConfig
from gateway.policies.base import Policy
from gateway.policies.registry import make_policy
from gateway.requests.slo import SloClass

RELOADABLE = frozenset((
    "classes",
    "default_class",
    "engines",
    "failover",
    "keys",
    "limits",
    "policy",
    "shadow",
    "logging.level",
    "predictor.timeout_ms",
    "server.body_fields",
    "server.cors",
    "server.drain_s",
    "server.max_body_bytes",
    "server.max_open_requests",
    "server.max_pass_through",
    "server.pass_through_routes",
    "server.sse_keep_alive_s",
))  # fmt: skip
"""Keys that a reload applies (`gateway.app.Gateway.reload`). All others need a restart."""


class GatewayConfig(Section):
    """The complete file."""

    server: ServerConfig = Field(default_factory=ServerConfig)
    limits: LimitsConfig = Field(default_factory=LimitsConfig)
    engines: list[EngineConfig] = Field(min_length=1, max_length=64)
    failover: FailoverConfig = Field(default_factory=FailoverConfig)
    predictor: PredictorConfig = Field(default_factory=PredictorConfig)
    policy: PolicyConfig = Field(default_factory=PolicyConfig)
    shadow: list[ShadowConfig] = Field(default_factory=list, max_length=8)
    classes: dict[Name, SloClassConfig] = Field(min_length=1, max_length=64)
    default_class: str
    keys: list[KeyConfig] = Field(default_factory=list, max_length=10_000)
    logging: LoggingConfig = Field(default_factory=LoggingConfig)
    tracing: TracingConfig = Field(default_factory=TracingConfig)
    decisions: DecisionsConfig = Field(default_factory=DecisionsConfig)

    @model_validator(mode="after")
    def _is_consistent(self) -> GatewayConfig:
        self._require_class(self.default_class, "default_class")
        digests: set[str] = set()
        weights: dict[str, float] = {}
        for index, key in enumerate(self.keys):
            for name in [key.default_class, *(key.allowed_classes or [])]:
                if name is not None:
                    self._require_class(name, f"keys[{index}]")
            default = key.default_class or self.default_class
            if key.allowed_classes is not None and default not in key.allowed_classes:
                raise ValueError(f"keys[{index}]: default class {default!r} is not in allowed_classes")
            if weights.setdefault(key.tenant, key.weight) != key.weight:
                raise ValueError(f"keys[{index}]: another key of tenant {key.tenant!r} has another weight")
            if key.sha256 in digests:
                raise ValueError(f"keys[{index}]: another key has the same digest")
            digests.add(key.sha256)
        labels = [shadow.label or shadow.name for shadow in self.shadow]
        for index, label in enumerate(labels):
            if label in labels[:index]:
                raise ValueError(f"shadow[{index}]: another shadow is called {label!r}; give it a label of its own")
        names = [engine.name for engine in self.engines]
        if len(set(names)) < len(names):
            raise ValueError("engines: names must be unique")
        if not self.keys and not self.server.allow_anonymous and not is_loopback(self.server.host):
            raise ValueError(
                f"server.host: other machines can reach {self.server.host} but no keys are configured; "
                "add keys, or set server.allow_anonymous: true"
            )
        return self

    def cautions(self) -> list[str]:
        """Return a message for each valid setting that is probably unintended: its key and the fix."""
        unbounded_e2e = [
            f"keys[{index}]"
            for index, key in enumerate(self.keys)
            if key.min_e2e_ms is None and not (key.min_ttft_ms is None and key.min_tpot_ms is None)
        ]
        if not unbounded_e2e:
            return []
        first, *others = unbounded_e2e
        keys = f"{first} and {len(others)} more" if others else first
        return [f"{keys}: min_ttft_ms and min_tpot_ms only partly limit x-slo-e2e-ms; set min_e2e_ms too"]

    def _require_class(self, name: str, key: str) -> None:
        if name not in self.classes:
            raise ValueError(f"{key}: no class is called {name!r}; classes: {', '.join(self.classes)}")

    def shadow_policies(self) -> dict[str, Policy]:
        """Return new shadow policies for one engine, by label."""
        return {s.label or s.name: make_policy(s.name, dict(s.options)) for s in self.shadow}

    def changed_shadows(self, old: GatewayConfig) -> set[str]:
        """Return the labels of the shadow policies that ``old`` does not have, or has with other options."""
        before = {shadow.label or shadow.name: (shadow.name, shadow.options) for shadow in old.shadow}
        return {s.label or s.name for s in self.shadow if before.get(s.label or s.name) != (s.name, s.options)}

    def slo_classes(self) -> dict[str, SloClass]:
        """Return the SLO classes by name."""
        return {name: SloClass(name, c.slo(), c.max_waiting, c.on_unattainable) for name, c in self.classes.items()}

    def api_keys(self) -> list[ApiKey]:
        """Return the API keys for the key ring."""
        return [
            ApiKey(
                tenant=k.tenant,
                default_class=k.default_class or self.default_class,
                sha256=k.sha256,
                allowed_classes=None if k.allowed_classes is None else frozenset(k.allowed_classes),
                least_bounds={
                    bound: ms / 1000
                    for bound, ms in (("ttft", k.min_ttft_ms), ("tpot", k.min_tpot_ms), ("e2e", k.min_e2e_ms))
                    if ms is not None
                },
                allowed_fields=self._allowed_fields(k.allowed_fields),
                allowed_models=None if k.allowed_models is None else frozenset(k.allowed_models),
                expires_s=None if k.expires is None else k.expires.timestamp(),
                weight=k.weight,
                operator=k.operator,
            )
            for k in self.keys
        ]

    def anonymous_key(self) -> ApiKey:
        """Return the rights of all requests if no keys are configured."""
        return ApiKey("anonymous", self.default_class, allowed_fields=self._allowed_fields(None))

    def engine_connections(self) -> int:
        """Return the maximum number of connections to engines."""
        remote = [engine for engine in self.engines if isinstance(engine, HttpEngineConfig)]
        return sum(engine.max_connections or engine.max_num_seqs + self.server.max_pass_through for engine in remote)

    def field_guard(self) -> FieldGuard:
        """Return what applies a key's rights to the fields of a body."""
        return FieldGuard(rejects=self.server.body_fields.on_denied == "reject")

    def _allowed_fields(self, of_key: list[str] | None) -> frozenset[str]:
        return frozenset(self.server.body_fields.allow if of_key is None else of_key)

    def changed(self, new: GatewayConfig) -> list[str]:
        """Return the keys whose values differ in ``new``, such as ``policy`` and ``server.port``."""
        old_values, new_values = _by_key(self), _by_key(new)
        return [key for key, value in new_values.items() if old_values[key] != value]

    def change_to(self, new: GatewayConfig) -> ConfigChange:
        """Return what a reload of ``new`` changes. Takes 0.1 s with 10,000 keys.

        Raises pydantic's ValidationError if the keys that change do not fit the others, which stay.
        """
        document, values, changed = self.model_dump(), _by_key(new), self.changed(new)
        for key in RELOADABLE.intersection(changed):
            section, _, name = key.partition(".")
            if name:
                document[section][name] = values[key]
            else:
                document[section] = values[key]
        return ConfigChange(parse(document), changed)


@dataclass(frozen=True, slots=True)
class ConfigChange:
    """A reload: ``config`` is the old configuration with those ``keys`` of the new one that are in `RELOADABLE`.

    ``keys`` are all that differ in the new one.
    """

    config: GatewayConfig
    keys: list[str]


def _by_key(config: GatewayConfig) -> dict[str, Any]:
    """Return the values by key, with one key for each member of a section such as ``server``."""
    values: dict[str, Any] = {}
    for section, value in config.model_dump().items():
        if isinstance(getattr(config, section), Section) and section not in RELOADABLE:
            values |= {f"{section}.{name}": member for name, member in value.items()}
        else:
            values[section] = value
    return values


def parse(document: Any) -> GatewayConfig:
    """Validate a parsed YAML document. Raises pydantic's ValidationError."""
    return GatewayConfig.model_validate(document)
