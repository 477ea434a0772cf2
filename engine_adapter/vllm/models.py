"""Resolves the configured model name."""

from __future__ import annotations

import logging

from engine_adapter.engine import EngineStartError

log = logging.getLogger("antares.engine")

BUILTIN = "builtin:smollm2-135m-instruct"
"""Model name in the configuration for the SmolLM2 model that ships as a Python package."""


def resolve_model(model: str) -> str:
    """The folder or hub id of ``model``. `BUILTIN` is converted on first use, which takes seconds.

    Raises `EngineStartError` if the conversion fails.
    """
    if model != BUILTIN:
        return model
    from engine_adapter.vllm.smollm2 import ModelPreparationError, prepare

    try:
        return str(prepare(report=_report))
    except ModelPreparationError as error:
        raise EngineStartError(str(error)) from error


def _report(line: str) -> None:
    log.info(line)
