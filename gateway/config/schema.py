"""Schema of the configuration file.

Latency bounds are in milliseconds, as in the request headers; other durations are in seconds. `gateway.config.file`
loads the file and adds line numbers to validation errors.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, field_validator, model_validator

from engine_adapter.step_time.linear_forms import StepTimes
from engine_adapter.step_time.profile import load_profile
from gateway.api.addresses import is_loopback
from gateway.api.auth import ApiKey
from gateway.api.body_fields import DEFAULT_ALLOWED, GUARDED_FIELDS, FieldGuard
from gateway.api.limits import Limits
from gateway.api.slo_headers import LONGEST_MS, SHORTEST_MS
from gateway.policies.base import Policy
from gateway.policies.registry import OPTION_ALIASES, make_policy
from gateway.requests.slo import Slo, SloClass

PositiveMs = Annotated[float, Field(ge=SHORTEST_MS, le=LONGEST_MS, allow_inf_nan=False)]
PolicyOptions = dict[str, bool | int | float | str]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


class Section(BaseModel):
    """A mapping in the file. Unknown keys are mistakes."""

    model_config = ConfigDict(extra="forbid")


ORIGIN = re.compile(r"\*|null|[a-z][a-z0-9+.-]*://[^/\s*?#]+")


class CorsConfig(Section):
    """Which web pages may call the API from a browser. No page by default."""

    allow_origins: list[str] = Field(min_length=1, max_length=256)
    allow_headers: list[str] = Field(default_factory=lambda: ["*"], max_length=128)
    max_age_s: int = Field(600, ge=0, le=86_400, description="How long a browser may reuse a preflight's answer.")

    @field_validator("allow_origins")
    @classmethod
    def _are_origins(cls, value: list[str]) -> list[str]:
        for origin in value:
            if not ORIGIN.fullmatch(origin):
                raise ValueError(
                    f"{origin[:64]!r} is not an origin; write scheme://host[:port] in lower case without a path, or '*'"
                )
        if "*" in value and len(value) > 1:
            raise ValueError("'*' allows every origin, so it must be the only entry")
        return value


def _guarded(names: list[str] | None) -> list[str] | None:
    """Check that each name is a guarded field."""
    for name in names or ():
        if name not in GUARDED_FIELDS:
            guarded = ", ".join(sorted(GUARDED_FIELDS))
            raise ValueError(f"{name[:64]!r} is not a guarded field; guarded fields: {guarded}")
    return names


class BodyFieldsConfig(Section):
    """Body fields that reach beyond their own request: which ones pass, and what happens to the others."""

    allow: list[str] = Field(default_factory=lambda: list(DEFAULT_ALLOWED), max_length=64)
    on_denied: Literal["strip", "reject"] = "strip"

    _are_guarded = field_validator("allow")(_guarded)


class ServerConfig(Section):
    """Listening address and limits of the gateway."""

    host: str = "127.0.0.1"
    port: int = Field(8100, ge=0, le=65535)
    allow_anonymous: bool = Field(
        False, description="Serve without API keys on an address that other machines can reach."
    )
    max_body_bytes: int = Field(8 << 20, ge=1024, le=1 << 30)
    max_open_requests: int = Field(4096, ge=1, description="Open requests above which new ones get 429 queue_full.")
    max_pass_through: int = Field(
        32, ge=1, description="Requests outside scheduling that one engine serves at a time; further ones wait."
    )
    pass_through_routes: list[Annotated[str, Field(pattern=r"^/v1/[A-Za-z0-9._/-]+$")]] = Field(
        default_factory=list, description="More paths under /v1 that reach an engine without scheduling."
    )
    cors: CorsConfig | None = Field(None, description="Cross-origin requests of browsers; null denies them.")
    sse_keep_alive_s: float | None = Field(
        None, ge=0.1, le=3600, description="Silence after which a stream that waits gets a comment; null sends none."
    )
    body_fields: BodyFieldsConfig = Field(default_factory=BodyFieldsConfig)
    drain_s: float = Field(30.0, ge=0, le=3600, description="Time that SIGTERM allows for open requests to finish.")


class LimitsConfig(Section):
    """What one client can make the gateway hold: connections, memory and time (docs/limits.md)."""

    max_head_bytes: int = Field(64 << 10, ge=4096, le=1 << 20, description="Largest request head; above it 431.")
    head_timeout_s: float = Field(15.0, ge=0.1, le=3600, description="Time for a client to send a request head.")
    idle_timeout_s: float = Field(75.0, ge=0.1, le=86_400, description="Time between two requests of a connection.")
    stall_s: float = Field(30.0, ge=0.1, le=3600, description="Time for which a client may stall while data is due.")
    min_bytes_per_s: int = Field(1024, ge=1, le=1 << 30, description="Slowest client, measured over stall_s.")
    response_buffer_bytes: int = Field(
        8 << 20, ge=1 << 16, le=1 << 30, description="Data of one response that may wait for its client."
    )
    response_memory_bytes: int = Field(256 << 20, ge=1 << 16, description="The same for all responses together.")
    body_memory_bytes: int = Field(512 << 20, ge=1 << 16, description="Bodies of all open requests together.")
    max_connections: int | None = Field(None, ge=1, description="Null: what the limit on descriptors allows.")
    max_connections_per_client: int | None = Field(None, ge=1, description="Null: three quarters of max_connections.")
    trusted_proxies: list[Annotated[str, Field(max_length=64)]] = Field(
        default_factory=list, max_length=256, description="Addresses or networks without a limit per client."
    )

    @field_validator("trusted_proxies")
    @classmethod
    def _are_networks(cls, value: list[str]) -> list[str]:
        for network in value:
            ipaddress.ip_network(network, strict=False)
        return value

    def limits(self) -> Limits:
        """Convert to the type that the HTTP edge uses."""
        return Limits(**{**self.model_dump(), "trusted_proxies": tuple(self.trusted_proxies)})


class StepTimesConfig(Section):
    """Initial step-time coefficients (seconds, tokens); see engine_adapter/step_time/linear_forms.py."""

    a: float = Field(0.0, ge=0)
    b: float = Field(3e-4, ge=0)
    c: float = Field(0.0, ge=0)
    d: float = Field(1e-2, ge=0)
    alpha: float = Field(3e-4, ge=0)
    beta: float = Field(0.0, ge=0)
    theta: float = Field(0.0, ge=0)
    delta: float = Field(0.0, ge=0)

    def times(self) -> StepTimes:
        """Convert to the step-time model's type."""
        return StepTimes(**self.model_dump())


ModelName = Annotated[str, Field(min_length=1, max_length=256)]
Aliases = Annotated[dict[ModelName, ModelName], Field(max_length=256)]


class VllmEngineConfig(Section):
    """vLLM in this process, its EngineCore in a child process. ``flags``: those of `vllm serve` without the dashes."""

    kind: Literal["vllm"]
    name: Name = "local"
    model: str = Field(description="A folder, a Hugging Face model id, or 'builtin:smollm2-135m-instruct'.")
    served_model_name: ModelName | list[ModelName] | None = None
    aliases: Aliases = Field(default_factory=dict, description="Names for clients, each with the engine's own name.")
    any_model: bool = Field(False, description="Also serve models that no engine lists.")
    flags: dict[str, bool | int | float | str | list[str] | None] = Field(default_factory=dict)
    env: dict[str, str | int | float] = Field(default_factory=dict, description="Set before vLLM is imported.")
    gate: Literal["credit", "slack", "open"] = Field("credit", description="Step gate of requests that name none.")
    step_times: StepTimesConfig | None = None
    calibrate: bool = True


class HttpEngineConfig(Section):
    """Any OpenAI-compatible server."""

    kind: Literal["http"]
    name: Name = "remote"
    base_url: str = Field(pattern=r"^https?://")
    api_key_env: str | None = Field(None, description="Environment variable that holds the server's API key.")
    models: list[ModelName] = Field(
        default_factory=list, max_length=4096, description="Models of a server that does not list its own."
    )
    aliases: Aliases = Field(default_factory=dict, description="Names for clients, each with the server's own name.")
    any_model: bool = Field(False, description="Also serve models that no engine lists.")
    max_num_seqs: int = Field(256, ge=1)
    max_num_batched_tokens: int = Field(2048, ge=1)
    max_model_len: int | None = Field(None, ge=1, description="Context length, unless the server states it.")
    prefix_caching: bool = Field(True, description="The server has a prefix cache. False: no prompt is expected in it.")
    max_connections: int | None = Field(None, ge=2, description="Maximum requests in flight on the server.")
    first_token: Literal["stream", "none"] = "stream"
    send_slo: bool = Field(True, description="Send SLO headers, and paces as vllm_xargs; the server must be vLLM.")
    step_times: StepTimesConfig | None = None


class SimulatedEngineConfig(Section):
    """A simulated engine for development: realistic timing from step times, meaningless text."""

    kind: Literal["simulated"]
    name: Name = "simulated"
    model: ModelName = "simulated"
    models: list[ModelName] = Field(default_factory=list, max_length=4096, description="Names of further models.")
    aliases: Aliases = Field(default_factory=dict, description="Names for clients, each with the engine's own name.")
    profile: str | None = Field(None, description="A shipped profile or a .json file: step times and limits.")
    max_num_seqs: int | None = Field(None, ge=1)
    max_num_batched_tokens: int | None = Field(None, ge=1)
    max_model_len: int | None = Field(None, ge=1)
    kv_tokens: int | None = Field(None, ge=1)
    prefix_caching: bool = Field(True, description="Prompts share the KV memory of equal beginnings.")
    gate: Literal["credit", "slack", "open"] = Field("credit", description="Step gate of requests that name none.")
    step_times: StepTimesConfig | None = Field(None, description="Step times to use instead of a profile's.")

    @model_validator(mode="after")
    def _profile_is_usable(self) -> SimulatedEngineConfig:
        if self.profile is not None and self.step_times is not None:
            raise ValueError("set profile or step_times, not both")
        if self.profile is not None:
            load_profile(self.profile)
        return self


EngineConfig = Annotated[VllmEngineConfig | HttpEngineConfig | SimulatedEngineConfig, Field(discriminator="kind")]


class FailoverConfig(Section):
    """When a request that an engine failed goes to another engine, and how long an engine that fails rests."""

    retry_ratio: float = Field(0.2, ge=0, le=1, description="Retries per recent request that are allowed.")
    min_retries_per_s: float = Field(10.0, ge=0, le=1e6, description="Retries per second that are always allowed.")
    first_token_timeout_s: float | None = Field(
        20.0, ge=0.1, le=3600, description="Shortest silence after which an engine counts as hung; null waits."
    )
    max_rest_s: float = Field(30.0, ge=1, le=3600, description="Longest rest of an engine between two probes.")


class PredictorConfig(Section):
    """The output-length predictor: a supervised child process, a remote service at ``url``, or disabled."""

    enabled: bool = True
    url: str | None = Field(
        None, pattern=r"^https?://", description="A predictor service to use instead of a supervised one."
    )
    port: int = Field(0, ge=0, le=65535, description="Port of the supervised predictor; 0 picks a free port.")
    timeout_ms: PositiveMs = 20.0
    model_dir: str | None = None
    state_dir: str | None = Field(
        None, description="Folder for the supervised predictor's corrections. Without it they are lost on exit."
    )
    collect_dir: str | None = Field(
        None, description="Folder for features and lengths of finished requests, for training. Never holds text."
    )
    collect_limit_mb: int = Field(256, ge=1, le=1 << 20)
    expected_tokens: float = Field(128, gt=0, description="Predicted output length before any request has finished.")


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


class KeyConfig(Section):
    """An API key, given by its digest (`antares config hash-key`), and the SLOs that it may request."""

    sha256: str
    tenant: Name
    default_class: str | None = None
    allowed_classes: list[str] | None = None
    min_ttft_ms: PositiveMs | None = None
    min_tpot_ms: PositiveMs | None = None
    min_e2e_ms: PositiveMs | None = None
    allowed_fields: list[str] | None = Field(None, max_length=64)
    allowed_models: list[ModelName] | None = Field(None, max_length=256)
    expires: AwareDatetime | None = Field(None, description="Time from which the key is refused.")
    weight: float = Field(1.0, gt=0, le=1000, description="The tenant's share of an engine, relative to the others.")
    operator: bool = Field(False, description="The key may reload the configuration.")

    _are_guarded = field_validator("allowed_fields")(_guarded)

    @field_validator("sha256")
    @classmethod
    def _is_digest(cls, value: str) -> str:
        if not re.fullmatch(r"[0-9a-f]{64}", value):
            raise ValueError("must be the 64 hex digits that `antares config hash-key` prints, not the key itself")
        return value


class LoggingConfig(Section):
    """Structured logs on stderr. They never contain prompt or completion text."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["text", "json"] = "text"
    access: Literal["none", "json"] = Field("none", description="One line of JSON for each request under /v1.")
    access_path: str | None = Field(None, min_length=1, description="File of the access log; null writes to stderr.")


class TracingConfig(Section):
    """OpenTelemetry traces over OTLP/HTTP (extra ``otel``). ``OTEL_*`` environment variables fill what is not set."""

    enabled: bool = False
    endpoint: str | None = Field(None, pattern=r"^https?://", description="The collector's base URL.")
    sample_ratio: float | None = Field(
        None, ge=0, le=1, description="Of the requests whose client sends no trace context."
    )


class DecisionsConfig(Section):
    """The records of ended requests, for `antares explain` (docs/observability.md). They never contain text."""

    keep: int = Field(10_000, ge=0, le=100_000, description="Records that are kept, about 1.3 kB each.")


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
