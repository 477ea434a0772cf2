"""Schema of the configuration file. Each subject has a module of its own; this one joins the sections.

Latency bounds are in milliseconds, as in the request headers; other durations are in seconds. `gateway.config.file`
loads the file and adds line numbers to validation errors.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from pydantic import Field, model_validator

from gateway.api.addresses import is_loopback
from gateway.api.auth import ApiKey
from gateway.api.body_fields import FieldGuard
from gateway.config.engines import EngineConfig, FailoverConfig, HttpEngineConfig, PredictorConfig, fixed_pools
from gateway.config.keys import SHARED, KeyConfig, KeysFileConfig
from gateway.config.observability import (
    DecisionsConfig,
    LoggingConfig,
    RecordingConfig,
    TracingConfig,
    WantedReplicasConfig,
)
from gateway.config.policies import PolicyConfig, RoutingConfig, ShadowConfig, SloClassConfig
from gateway.config.section import Name, Section
from gateway.config.server import LimitsConfig, ServerConfig
from gateway.config.shard import ShardConfig
from gateway.policies.base import Policy
from gateway.policies.registry import make_policy
from gateway.requests.slo import SloClass
from gateway.tenants.limits import TenantLimits

RELOADABLE = frozenset((
    "classes",
    "default_class",
    "engines",
    "failover",
    "keys",
    "keys_file",
    "limits",
    "policy",
    "recording",
    "routing",
    "shadow",
    "logging.level",
    "predictor.timeout_ms",
    "server.body_fields",
    "server.cors",
    "server.drain_s",
    "server.max_body_bytes",
    "server.max_open_requests",
    "server.max_pass_through",
    "server.operator_auth",
    "server.pass_through_routes",
    "server.sse_keep_alive_s",
))  # fmt: skip
"""Keys that a reload applies (`gateway.app.Gateway.reload`). All others need a restart."""


class GatewayConfig(Section):
    """The complete file."""

    server: ServerConfig = Field(default_factory=ServerConfig)
    limits: LimitsConfig = Field(default_factory=LimitsConfig)
    engines: list[EngineConfig] = Field(min_length=1, max_length=64)
    shard: ShardConfig = Field(default_factory=ShardConfig)
    failover: FailoverConfig = Field(default_factory=FailoverConfig)
    predictor: PredictorConfig = Field(default_factory=PredictorConfig)
    policy: PolicyConfig = Field(default_factory=PolicyConfig)
    routing: RoutingConfig = Field(default_factory=RoutingConfig)
    shadow: list[ShadowConfig] = Field(default_factory=list, max_length=8)
    classes: dict[Name, SloClassConfig] = Field(min_length=1, max_length=64)
    default_class: str
    keys: list[KeyConfig] = Field(default_factory=list, max_length=10_000)
    keys_file: KeysFileConfig | None = None
    logging: LoggingConfig = Field(default_factory=LoggingConfig)
    tracing: TracingConfig = Field(default_factory=TracingConfig)
    recording: RecordingConfig = Field(default_factory=RecordingConfig)
    decisions: DecisionsConfig = Field(default_factory=DecisionsConfig)
    wanted_replicas: WantedReplicasConfig = Field(default_factory=WantedReplicasConfig)

    @model_validator(mode="after")
    def _is_consistent(self) -> GatewayConfig:
        self._require_class(self.default_class, "default_class")
        self._require_consistent_keys()
        labels = [shadow.label or shadow.name for shadow in self.shadow]
        for index, label in enumerate(labels):
            if label in labels[:index]:
                raise ValueError(f"shadow[{index}]: another shadow is called {label!r}; give it a label of its own")
        names = [engine.name for engine in self.engines]
        if len(set(names)) < len(names):
            raise ValueError("engines: names must be unique")
        for engine in self.engines:
            if isinstance(engine, HttpEngineConfig) and engine.discover is not None:
                taken = next((name for name in names if re.fullmatch(rf"{re.escape(engine.name)}-\d+", name)), None)
                if taken:
                    raise ValueError(f"engines: {engine.name!r} names what it discovers like {taken!r}; rename one")
        if not self.requires_key and not self.server.allow_anonymous and not is_loopback(self.server.host):
            raise ValueError(
                f"server.host: other machines can reach {self.server.host} but no keys are configured; "
                "add keys, or set server.allow_anonymous: true"
            )
        self._require_operator_auth()
        self._require_divisible_engines()
        if self.wanted_replicas.enabled and self.decisions.keep == 0:
            raise ValueError("wanted_replicas: it reads the records of requests; set decisions.keep above 0")
        return self

    def _require_operator_auth(self) -> None:
        asked = self.server.operator_auth
        if asked and not self.requires_key:
            raise ValueError("server.operator_auth: no keys are configured; add `keys_file: keys.json` and a key")
        if asked is False and self.requires_key and not is_loopback(self.server.host):
            raise ValueError(
                f"server.operator_auth: other machines can reach {self.server.host}, so the pages of the "
                "operator need a key; remove this line, or listen on 127.0.0.1"
            )

    def _require_divisible_engines(self) -> None:
        if self.server.processes == 1:
            return
        for engine in self.engines:
            if not isinstance(engine, HttpEngineConfig):
                raise ValueError(
                    f"server.processes: each process would start its own engine {engine.name!r}, which is of kind "
                    f"{engine.kind}; only kind http can be divided"
                )
        if self.server.port + self.server.processes > 65535:
            raise ValueError(
                "server.processes: each process has a port of its own, after server.port; choose a lower one"
            )

    @property
    def operator_key_required(self) -> bool:
        """Whether `/metrics`, `/status`, `/dashboard` and `/docs` need the key of an operator.

        They need none on a gateway that serves without keys, beyond the loopback only with ``allow_anonymous``.
        """
        asked = self.server.operator_auth
        return self.requires_key and (not is_loopback(self.server.host) if asked is None else asked)

    @property
    def requires_key(self) -> bool:
        """Whether clients need a key. A keys file requires one even while it holds none, so revoking opens nothing."""
        return bool(self.keys) or self.keys_file is not None

    def all_keys(self) -> list[tuple[str, KeyConfig]]:
        """Return every key with its place, such as ``keys[0]`` or ``keys_file.keys[0]``."""
        in_file = [] if self.keys_file is None else self.keys_file.keys
        return [(f"keys[{index}]", key) for index, key in enumerate(self.keys)] + [
            (f"keys_file.keys[{index}]", key) for index, key in enumerate(in_file)
        ]

    def _require_consistent_keys(self) -> None:
        digests: set[str] = set()
        first_of: dict[str, KeyConfig] = {}
        for place, key in self.all_keys():
            for name in [key.default_class, *(key.allowed_classes or [])]:
                if name is not None:
                    self._require_class(name, place)
            default = key.default_class or self.default_class
            if key.allowed_classes is not None and default not in key.allowed_classes:
                raise ValueError(f"{place}: default class {default!r} is not in allowed_classes")
            first = first_of.setdefault(key.tenant, key)
            for setting in SHARED:
                if getattr(first, setting) != getattr(key, setting):
                    raise ValueError(f"{place}: another key of tenant {key.tenant!r} has another {setting}")
            if key.sha256 in digests:
                raise ValueError(f"{place}: another key has the same digest")
            digests.add(key.sha256)

    def cautions(self, processes: int = 1) -> list[str]:
        """Return a message for each valid setting that is probably unintended: its key and the fix.

        ``processes``: of each gateway. NOTE: in one of several processes, ``shard.count`` counts them already.
        """
        cautions = []
        if self.operator_key_required and not any(key.operator for _, key in self.all_keys()):
            cautions.append(
                "keys: /metrics, /status, /dashboard and /docs need a key with operator: true and there is none; "
                "`antares key new --operator` makes one"
            )
        unbounded_e2e = [
            place
            for place, key in self.all_keys()
            if key.min_e2e_ms is None and not (key.min_ttft_ms is None and key.min_tpot_ms is None)
        ]
        if unbounded_e2e:
            first, *others = unbounded_e2e
            keys = f"{first} and {len(others)} more" if others else first
            cautions.append(f"{keys}: min_ttft_ms and min_tpot_ms only partly limit x-slo-e2e-ms; set min_e2e_ms too")
        for pool, names in fixed_pools(self.engines).items():
            if len(names) < (count := self.shard.count * processes):
                cautions.append(
                    f"engines: {count} gateways divide {len(names)} engines called {pool!r}, so some share "
                    "an engine; give engines of one model the same name with numbers, such as main-1 and main-2"
                )
        return cautions

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
        allowed = self._allowed_fields()
        return [key.api_key(self.default_class, allowed) for _, key in self.all_keys()]

    def tenant_limits(self) -> dict[str, TenantLimits]:
        """Return this gateway's part of the limits by tenant. All keys of a tenant have the same.

        Raises ValueError if the gateway's place in `shard` is not known.
        """
        shard = self.shard.shard()
        return {key.tenant: key.limits.part_of(shard) for _, key in self.all_keys()}

    def anonymous_key(self) -> ApiKey:
        """Return the rights of all requests if no keys are configured."""
        return ApiKey("anonymous", self.default_class, allowed_fields=self._allowed_fields())

    def engine_connections(self) -> int:
        """Return the maximum number of connections to engines."""
        remote = [engine for engine in self.engines if isinstance(engine, HttpEngineConfig)]
        each = self.server.max_pass_through
        return sum(e.most_engines * (e.max_connections or e.max_num_seqs + each) for e in remote)

    def field_guard(self) -> FieldGuard:
        """Return what applies a key's rights to the fields of a body."""
        fields = self.server.body_fields
        return FieldGuard(fields.on_denied == "reject", fields.prefix_isolation)

    def _allowed_fields(self) -> frozenset[str]:
        return frozenset(self.server.body_fields.allow)

    def with_keys(self, entries: list[Any]) -> ConfigChange:
        """Return the change to ``entries`` of the keys file. Raises pydantic's ValidationError, as `change_to`."""
        assert self.keys_file is not None
        new = parse({**self.model_dump(), "keys_file": {"path": self.keys_file.path, "keys": entries}})
        return ConfigChange(new, self.changed(new))

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
