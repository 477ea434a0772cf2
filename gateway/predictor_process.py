"""The predictor service as a supervised child process of the gateway."""

from __future__ import annotations

import socket
import sys
import tempfile
from contextlib import AsyncExitStack, ExitStack

from gateway.config.schema import GatewayConfig
from gateway.supervisor import Supervisor


def supervised_predictor(
    config: GatewayConfig, stack: ExitStack | AsyncExitStack
) -> tuple[Supervisor | None, str | None]:
    """Return the predictor's supervisor (None: it runs elsewhere) and its URL (None: it is disabled).

    Its state survives its restarts. If the configuration has no folder for it, one exists until ``stack`` ends.
    """
    if not config.predictor.enabled:
        return None, None
    if config.predictor.url:
        return None, config.predictor.url.rstrip("/")
    port = config.predictor.port or _free_port()
    command = [sys.executable, "-P", "-m", "predictor_service.cli", "serve"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--exit-with-parent"]
    command += ["--state", config.predictor.state_dir or stack.enter_context(_folder())]
    if config.predictor.model_dir:
        command += ["--model", config.predictor.model_dir]
    if config.predictor.collect_dir:
        command += ["--collect", config.predictor.collect_dir]
        command += ["--collect-limit-mb", str(config.predictor.collect_limit_mb)]
    return Supervisor("predictor", command), f"http://127.0.0.1:{port}"


def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="antares-", ignore_cleanup_errors=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
