"""Runs the gateway of a configuration file, in this process or in several."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Coroutine, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from gateway.child import Child
from gateway.config.file import load, recorded_deprecations
from gateway.config.mistakes import ConfigError
from gateway.config.schema import GatewayConfig
from gateway.listening import ServeError
from gateway.observability import logs


def run_gateway(file: Path, overrides: Mapping[str, Any], child: Child | None = None) -> int:
    """Serve until a signal ends it, and return the exit code. Mistakes are printed: 2 in the file, 1 at the start.

    ``overrides``: values of dotted keys that replace those of ``file``. ``child``: which of several processes this is.
    """
    try:
        with recorded_deprecations() as deprecations:
            config = load(file, overrides=overrides)
    except ConfigError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    logs.configure(config.logging.level, config.logging.format, None if child is None else child.index)
    # Of several processes, the first one says for all what is in the file.
    for deprecation in [] if child is not None and child.index else deprecations:
        logging.getLogger("antares.config").warning("%s: %s", file, deprecation)
    try:
        return _run(_served(file, config, overrides, child))
    except ServeError as error:
        sys.stderr.write(f"antares: {error}\n")
        return 1
    except (KeyboardInterrupt, asyncio.CancelledError):
        return 130


def _served(
    file: Path, config: GatewayConfig, overrides: Mapping[str, Any], child: Child | None
) -> Coroutine[Any, Any, int]:
    """Return what serves. The parent of several processes imports no gateway."""
    if child is None and config.server.processes > 1:
        from gateway.processes.parent import serve_all

        return serve_all(file, config, overrides)
    from gateway.serve import serve

    if sys.platform == "win32":
        return serve(config)
    return serve(config, partial(load, file, overrides=overrides), file, child)


def _run(served: Coroutine[Any, Any, int]) -> int:
    if sys.platform == "win32":
        return asyncio.run(served)
    import uvloop

    code: int = uvloop.run(served)
    return code
