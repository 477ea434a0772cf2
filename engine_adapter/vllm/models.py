"""Which model a configuration means."""

from __future__ import annotations

import logging

from engine_adapter.engine import EngineStartError

log = logging.getLogger("antares.engine")

BUILTIN = "builtin:smollm2-135m-instruct"


def resolve_model(model: str) -> str:
    """A model's folder or hub id; `BUILTIN` is prepared on first use (seconds). Raises `EngineStartError`."""
    if model != BUILTIN:
        return model
    from engine_adapter.vllm.smollm2 import ModelPreparationError, prepare

    try:
        return str(prepare(report=_report))
    except ModelPreparationError as error:
        raise EngineStartError(str(error)) from error


def _report(line: str) -> None:
    log.info(line)
