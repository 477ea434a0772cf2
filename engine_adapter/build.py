"""Builds engines from their configuration. The module of each engine kind is imported on first use."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from engine_adapter.engine import Engine, EngineStartError
from engine_adapter.key_variable import key_in
from engine_adapter.step_time.linear_forms import StepTimes


def vllm_engine(
    *, name: str, model: str, env: dict[str, Any], step_times: StepTimes | None = None, **options: Any
) -> Engine:
    """An in-process vLLM engine.

    Variables in ``env`` are set before vLLM is imported, unless the environment already has them.
    """
    from engine_adapter.vllm.engine import VllmEngine

    for variable, value in env.items():
        os.environ.setdefault(variable, str(value))
    return VllmEngine(name, model, step_times=step_times, **options)


def http_engine(*, api_key_env: str | None, report: dict[str, Any] | None = None, **options: Any) -> Engine:
    """A remote OpenAI-compatible server.

    ``report``: port, host and ``key_env`` of the report channel; there is none if the port is None. Raises
    `EngineStartError` if a variable that ``api_key_env`` or ``key_env`` names is not set.
    """
    from engine_adapter.remote.engine import HttpEngine
    from engine_adapter.remote.reports import ReportAddress
    from engine_adapter.report_channel.messages import checked_key

    key = _variable("api_key_env", api_key_env) if api_key_env else None
    address = None
    if report is not None:
        variable = report["key_env"]
        try:
            secret = checked_key(_variable("report.key_env", variable), variable)
        except ValueError as error:
            raise EngineStartError(f"report.key_env: {error}") from None
        if report["port"] is not None:
            address = ReportAddress(report["port"], secret, report["host"])
    return HttpEngine(api_key=key, report=address, **options)


def _variable(key: str, name: str) -> str:
    """Return the key in the environment variable ``name``, which ``key`` of the configuration names."""
    try:
        value = key_in(name)
    except ValueError as error:
        raise EngineStartError(f"{key}: {error}") from None
    if not value:
        raise EngineStartError(f"{key} names {name}, but that environment variable is not set")
    return value


def simulated_engine(*, step_times: StepTimes | None = None, profile: str | None = None, **options: Any) -> Engine:
    """A simulated engine. Options that are missing or None come from the profile, or are defaults.

    Raises `EngineStartError` for an unknown profile or a bad option.
    """
    from engine_adapter.simulated.engine import SimulatedEngine
    from engine_adapter.step_time.profile import load_profile

    given = {name: option for name, option in options.items() if option is not None}
    try:
        return SimulatedEngine(times=step_times, profile=None if profile is None else load_profile(profile), **given)
    except ValueError as error:
        raise EngineStartError(str(error)) from error


BUILDERS: dict[str, Callable[..., Engine]] = {"vllm": vllm_engine, "http": http_engine, "simulated": simulated_engine}
