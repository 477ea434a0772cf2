"""Sections of the engines, of failover between them, and of the predictor."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from engine_adapter.step_time.linear_forms import StepTimes
from engine_adapter.step_time.profile import load_profile
from gateway.config.section import ModelName, Name, PositiveMs, Section, ServerUrl

Aliases = Annotated[dict[ModelName, ModelName], Field(max_length=256)]


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


class VllmEngineConfig(Section):
    """vLLM in this process, its EngineCore in a child process. ``flags``: those of `vllm serve` without the dashes."""

    kind: Literal["vllm"]
    name: Name = "local"
    model: str = Field(description="A folder, a Hugging Face model id, or 'builtin:smollm2-135m-instruct'.")
    served_model_name: ModelName | list[ModelName] | None = None
    aliases: Aliases = Field(default_factory=dict, description="Names for clients, each with the engine's own name.")
    any_model: bool = Field(False, description="Also serve models that no engine lists.")
    flags: dict[str, bool | int | float | str | list[str] | dict[str, Any] | None] = Field(default_factory=dict)
    env: dict[str, str | int | float] = Field(default_factory=dict, description="Set before vLLM is imported.")
    gate: Literal["credit", "slack", "open"] = Field(
        "credit", description="Step gate under policies without one, such as fcfs."
    )
    step_times: StepTimesConfig | None = None
    calibrate: bool = True
    hang_timeout_s: float | None = Field(
        5.0,
        ge=1,
        le=3600,
        description="Shortest time without a step after which a busy engine is restarted; null: never.",
    )


class DiscoverConfig(Section):
    """How the servers of an engine are found: each address of the host in `base_url`, or each URL in a file."""

    file: str | None = Field(None, description="A JSON file with the base URLs of the servers, in place of the host.")
    every_s: float = Field(5.0, ge=0.5, le=300, description="Time between two look-ups.")
    max_engines: int = Field(64, ge=1, le=256, description="Addresses beyond this number are ignored.")


class ReportConfig(Section):
    """The report channel of a vLLM server that runs the scheduler class."""

    port: int | None = Field(
        None, ge=1, le=65535, description="Port in the server's ANTARES_REPORT_ADDRESS; null: as discover.file says."
    )
    key_env: str = Field(min_length=1, description="Environment variable with the server's ANTARES_REPORT_KEY.")
    host: str | None = Field(None, min_length=1, description="By default the host of the server.")


class HttpEngineConfig(Section):
    """Any OpenAI-compatible server."""

    kind: Literal["http"]
    name: Name = "remote"
    base_url: ServerUrl
    discover: DiscoverConfig | None = Field(None, description="Find one engine per address of the host.")
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
    report: ReportConfig | None = Field(None, description="Where the server's scheduler class reports its steps.")
    step_times: StepTimesConfig | None = None

    @model_validator(mode="after")
    def _addresses_have_no_certificates(self) -> HttpEngineConfig:
        if self.discover is not None and self.discover.file is None and not self.base_url.lower().startswith("http://"):
            raise ValueError("discover needs a base_url with http://: certificates name hosts, not addresses")
        return self

    @model_validator(mode="after")
    def _report_has_a_port(self) -> HttpEngineConfig:
        from_file = self.discover is not None and self.discover.file is not None
        if self.report is not None and self.report.port is None and not from_file:
            raise ValueError("report.port is missing; only a discover.file can say it for each server")
        return self

    @property
    def most_engines(self) -> int:
        """How many engines the section can become."""
        return 1 if self.discover is None else self.discover.max_engines


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
    gate: Literal["credit", "slack", "open"] = Field(
        "credit", description="Step gate under policies without one, such as fcfs."
    )
    step_times: StepTimesConfig | None = Field(None, description="Step times to use instead of a profile's.")

    @model_validator(mode="after")
    def _profile_is_usable(self) -> SimulatedEngineConfig:
        if self.profile is not None and self.step_times is not None:
            raise ValueError("set profile or step_times, not both")
        if self.profile is not None:
            load_profile(self.profile)
        return self


EngineConfig = Annotated[VllmEngineConfig | HttpEngineConfig | SimulatedEngineConfig, Field(discriminator="kind")]


def fixed_pools(sections: Sequence[EngineConfig]) -> dict[str, set[str]]:
    """Return the names of the remote engines with a fixed address, by pool: the name without the number at its end."""
    pools: dict[str, set[str]] = {}
    for section in sections:
        if isinstance(section, HttpEngineConfig) and section.discover is None:
            pools.setdefault(re.sub(r"[-_.]?\d+$", "", section.name), set()).add(section.name)
    return pools


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
    url: ServerUrl | None = Field(None, description="A predictor service to use instead of a supervised one.")
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
