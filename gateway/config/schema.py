"""The configuration file, as data. Milliseconds at the edge, as in the headers; everything else in seconds.

`gateway.config.file` reads it and says where a mistake is.
"""

from __future__ import annotations

import ipaddress
import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from engine_adapter.step_time.linear_forms import StepTimes
from engine_adapter.step_time.profile import load_profile
from gateway.api.auth import ApiKey
from gateway.api.slo_headers import LONGEST_MS, SHORTEST_MS
from gateway.policies.base import Policy
from gateway.policies.registry import make_policy
from gateway.requests.slo import Slo, SloClass

PositiveMs = Annotated[float, Field(ge=SHORTEST_MS, le=LONGEST_MS, allow_inf_nan=False)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


class Section(BaseModel):
    """A part of the file; unknown keys are mistakes."""

    model_config = ConfigDict(extra="forbid")


class ServerConfig(Section):
    """Where the gateway listens and what it puts up with."""

    host: str = "127.0.0.1"
    port: int = Field(8100, ge=0, le=65535)
    allow_anonymous: bool = Field(
        False, description="Serve without API keys on an address that other machines can reach."
    )
    max_body_bytes: int = Field(8 << 20, ge=1024, le=1 << 30)
    max_open_requests: int = Field(4096, ge=1, description="Accepted and not ended; beyond it, 429 queue_full.")
    drain_s: float = Field(30.0, ge=0, le=3600, description="How long SIGTERM waits for requests in flight.")


class StepTimesConfig(Section):
    """Step-time coefficients to start from (seconds, tokens); see engine_adapter/step_time/linear_forms.py."""

    a: float = Field(0.0, ge=0)
    b: float = Field(3e-4, ge=0)
    c: float = Field(0.0, ge=0)
    d: float = Field(1e-2, ge=0)
    alpha: float = Field(3e-4, ge=0)
    beta: float = Field(0.0, ge=0)
    theta: float = Field(0.0, ge=0)
    delta: float = Field(0.0, ge=0)

    def times(self) -> StepTimes:
        """As the model takes them."""
        return StepTimes(**self.model_dump())


class VllmEngineConfig(Section):
    """vLLM in this process. ``flags`` are `vllm serve`'s own, without the dashes."""

    kind: Literal["vllm"]
    name: Name = "local"
    model: str = Field(description="A folder, a hub id, or 'builtin:smollm2-135m-instruct'.")
    served_model_name: str | None = None
    flags: dict[str, bool | int | float | str | list[str] | None] = Field(default_factory=dict)
    env: dict[str, str | int | float] = Field(default_factory=dict, description="Set before vLLM is imported.")
    gate: Literal["credit", "slack", "open"] = Field("credit", description="Of requests that name none.")
    step_times: StepTimesConfig | None = None
    calibrate: bool = True


class HttpEngineConfig(Section):
    """Any OpenAI-compatible server."""

    kind: Literal["http"]
    name: Name = "remote"
    base_url: str = Field(pattern=r"^https?://")
    api_key_env: str | None = Field(None, description="Environment variable with the server's own API key.")
    max_num_seqs: int = Field(256, ge=1)
    max_num_batched_tokens: int = Field(2048, ge=1)
    max_model_len: int = Field(8192, ge=1)
    first_token: Literal["stream", "none"] = "stream"
    send_slo: bool = Field(True, description="Send TPOT bounds as vllm_xargs; the server must be vLLM.")
    step_times: StepTimesConfig | None = None


class SimulatedEngineConfig(Section):
    """A simulated engine: honest timing from step times, meaningless text. For development."""

    kind: Literal["simulated"]
    name: Name = "simulated"
    model: str = "simulated"
    profile: str | None = Field(None, description="A shipped profile or a .json file: its step times and its limits.")
    max_num_seqs: int | None = Field(None, ge=1)
    max_num_batched_tokens: int | None = Field(None, ge=1)
    max_model_len: int | None = Field(None, ge=1)
    kv_tokens: int | None = Field(None, ge=1)
    gate: Literal["credit", "slack", "open"] = Field("credit", description="Of requests that name none.")
    step_times: StepTimesConfig | None = Field(None, description="Instead of a profile's.")

    @model_validator(mode="after")
    def _can_be_made(self) -> SimulatedEngineConfig:
        if self.profile is not None and self.step_times is not None:
            raise ValueError("give profile or step_times, not both")
        if self.profile is not None:
            load_profile(self.profile)
        return self


EngineConfig = Annotated[VllmEngineConfig | HttpEngineConfig | SimulatedEngineConfig, Field(discriminator="kind")]


class PredictorConfig(Section):
    """The output-length predictor: supervised here, somewhere else by ``url``, or off."""

    enabled: bool = True
    url: str | None = Field(None, pattern=r"^https?://", description="A predictor that runs elsewhere.")
    port: int = Field(0, ge=0, le=65535, description="Port of the supervised one; 0 picks a free one.")
    timeout_ms: PositiveMs = 20.0
    model_dir: str | None = None
    state_dir: str | None = Field(
        None, description="Where the supervised one keeps what it learnt; without, that ends with the gateway."
    )
    collect_dir: str | None = Field(
        None, description="Where the supervised one collects features and lengths of finished requests; no text."
    )
    collect_limit_mb: int = Field(256, ge=1, le=1 << 20)
    expected_tokens: float = Field(128, gt=0, description="Output length to assume before any has been seen.")


class PolicyConfig(Section):
    """Which policy decides, with its options."""

    name: str = "slack"
    options: dict[str, bool | int | float | str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _exists(self) -> PolicyConfig:
        make_policy(self.name, dict(self.options))
        return self


class ShadowConfig(Section):
    """A policy that only watches, with its options; a plain name stands for one without any (docs/shadow.md)."""

    name: str
    options: dict[str, bool | int | float | str] = Field(default_factory=dict)
    label: Name | None = Field(None, description="What metrics call it; by default, its name.")

    @model_validator(mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _exists(self) -> ShadowConfig:
        make_policy(self.name, dict(self.options))
        return self


class SloClassConfig(Section):
    """A class's default bounds, its queue, and what happens to requests that cannot attain theirs."""

    ttft_ms: PositiveMs | None = None
    tpot_ms: PositiveMs | None = None
    e2e_ms: PositiveMs | None = None
    max_waiting: int = Field(1024, ge=1, le=1_000_000)
    on_unattainable: Literal["reject", "best_effort"] = "reject"

    def slo(self) -> Slo:
        """The bounds, in seconds."""

        def seconds(ms: float | None) -> float | None:
            return None if ms is None else ms / 1000

        return Slo(seconds(self.ttft_ms), seconds(self.tpot_ms), seconds(self.e2e_ms))


class KeyConfig(Section):
    """An API key, by its digest (`antares config hash-key`), and what it may ask for."""

    sha256: str
    tenant: Name
    default_class: str | None = None
    allowed_classes: list[str] | None = None
    min_ttft_ms: PositiveMs | None = None
    min_tpot_ms: PositiveMs | None = None
    min_e2e_ms: PositiveMs | None = None

    @field_validator("sha256")
    @classmethod
    def _is_digest(cls, value: str) -> str:
        if not re.fullmatch(r"[0-9a-f]{64}", value):
            raise ValueError("must be the 64 hex digits that `antares config hash-key` prints, not the key itself")
        return value


class LoggingConfig(Section):
    """Structured logs on stderr. They never hold prompt or completion text."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["text", "json"] = "text"


class GatewayConfig(Section):
    """The whole file."""

    server: ServerConfig = Field(default_factory=ServerConfig)
    engines: list[EngineConfig] = Field(min_length=1, max_length=64)
    predictor: PredictorConfig = Field(default_factory=PredictorConfig)
    policy: PolicyConfig = Field(default_factory=PolicyConfig)
    shadow: list[ShadowConfig] = Field(default_factory=list, max_length=8)
    classes: dict[Name, SloClassConfig] = Field(min_length=1, max_length=64)
    default_class: str
    keys: list[KeyConfig] = Field(default_factory=list, max_length=10_000)
    logging: LoggingConfig = Field(default_factory=LoggingConfig)

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> GatewayConfig:
        self._known_class(self.default_class, "default_class")
        for index, key in enumerate(self.keys):
            for name in [key.default_class, *(key.allowed_classes or [])]:
                if name is not None:
                    self._known_class(name, f"keys[{index}]")
            default = key.default_class or self.default_class
            if key.allowed_classes is not None and default not in key.allowed_classes:
                raise ValueError(f"keys[{index}]: its default class {default!r} is not among its allowed_classes")
            if any(key.sha256 == other.sha256 for other in self.keys[:index]):
                raise ValueError(f"keys[{index}]: another key has the same digest")
        labels = [shadow.label or shadow.name for shadow in self.shadow]
        for index, label in enumerate(labels):
            if label in labels[:index]:
                raise ValueError(f"shadow[{index}]: another shadow is called {label!r}; give it a label of its own")
        names = [engine.name for engine in self.engines]
        if len(set(names)) < len(names):
            raise ValueError("engines: every engine needs a name of its own")
        if not self.keys and not self.server.allow_anonymous and not _is_loopback(self.server.host):
            raise ValueError(
                f"server.host: {self.server.host} can be reached from other machines but no keys are configured; "
                "add keys, or set server.allow_anonymous: true"
            )
        return self

    def cautions(self) -> list[str]:
        """What is valid but hardly meant, for people to read: each says where, and what to set."""
        loose = [
            f"keys[{index}]"
            for index, key in enumerate(self.keys)
            if key.min_e2e_ms is None and not (key.min_ttft_ms is None and key.min_tpot_ms is None)
        ]
        if not loose:
            return []
        where = loose[0] if len(loose) == 1 else f"{loose[0]} and {len(loose) - 1} more"
        return [f"{where}: min_ttft_ms and min_tpot_ms hardly bound what x-slo-e2e-ms may ask for; set min_e2e_ms too"]

    def _known_class(self, name: str, where: str) -> None:
        if name not in self.classes:
            raise ValueError(f"{where}: no class is called {name!r}; classes: {', '.join(self.classes)}")

    def shadow_policies(self) -> dict[str, Policy]:
        """Fresh policies for the shadows of one engine, by label."""
        return {s.label or s.name: make_policy(s.name, dict(s.options)) for s in self.shadow}

    def slo_classes(self) -> dict[str, SloClass]:
        """The classes by name."""
        return {name: SloClass(name, c.slo(), c.max_waiting, c.on_unattainable) for name, c in self.classes.items()}

    def api_keys(self) -> list[ApiKey]:
        """The keys as the key ring takes them."""
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
            )
            for k in self.keys
        ]


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def parse(document: Any) -> GatewayConfig:
    """Validate a parsed document; raises pydantic's ValidationError."""
    return GatewayConfig.model_validate(document)
