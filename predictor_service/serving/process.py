"""Runs the predictor as a process: one uvicorn worker, logs to stderr, graceful shutdown.

SIGTERM and SIGINT end the process with status 0 after the calls in flight are answered. With ``exit_with_parent``, the
process also ends when the process that started it is gone.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from predictor_service.calibration.state import CalibrationState, fingerprint
from predictor_service.model.length_model import load_model
from predictor_service.serving.batching import BatchLimits
from predictor_service.serving.collecting import Collector
from predictor_service.serving.learning import Learning

log = logging.getLogger("antares.predictor")

PARENT_POLL_S = 0.5
"""Seconds between two checks for the parent process.

NOTE: PR_SET_PDEATHSIG is no alternative. It fires when the parent's *thread* ends, and a gateway may start the
predictor from any thread.
"""


class CannotListen(Exception):  # noqa: N818
    """The address cannot be bound. The message names the address and the reason."""


@dataclass(slots=True, frozen=True)
class LearningFolders:
    """Folders that the service writes to; None disables the feature.

    ``state``: saved corrections. ``collect``: training data, at most ``collect_limit_bytes``.
    """

    state: Path | None = None
    collect: Path | None = None
    collect_limit_bytes: int = 256 << 20


def run_server(
    host: str,
    port: int,
    *,
    model: Path,
    limits: BatchLimits,
    folders: LearningFolders,
    known_models: frozenset[str],
    log_level: str,
    exit_with_parent: bool,
) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises:
        ModelUnusable: the model cannot be loaded.
        CannotListen: the address cannot be bound.
        StateUnusable: the state folder cannot be written.
        OSError: the folder for training data cannot be created.
    """
    if exit_with_parent:
        _watch_parent(os.getppid())
    for number in (signal.SIGTERM, signal.SIGINT):
        # uvicorn replaces these handlers while it runs, and raises the signal again after its shutdown.
        signal.signal(number, _exit_on_signal)
    logging.basicConfig(
        stream=sys.stderr, level=log_level.upper(), format="%(asctime)s %(levelname)s %(name)s %(message)s"
    )
    loaded = load_model(model)
    learning = Learning(
        state=CalibrationState(folders.state, fingerprint(loaded.name, model)) if folders.state else None,
        collector=Collector(folders.collect, folders.collect_limit_bytes) if folders.collect else None,
    )

    import uvicorn

    from predictor_service.serving.app import create_app

    listening = _bind(host, port)
    log.info("serving %s on http://%s:%d", loaded.name, host, port)
    config = uvicorn.Config(
        create_app(loaded, limits, learning, known_models),
        access_log=False,
        log_config=None,
        log_level=log_level.lower(),
        server_header=False,
        # Longer than clients keep an idle connection, so that the service never closes one that a client reuses.
        timeout_keep_alive=75,
        timeout_graceful_shutdown=5,
    )
    uvicorn.Server(config).run(sockets=[listening])


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise CannotListen(
            f"cannot listen on {host}:{port}: {error.strerror}. Choose another --host or --port"
        ) from None


def _exit_on_signal(number: int, frame: FrameType | None) -> None:
    raise SystemExit(0)


def _watch_parent(parent: int) -> None:
    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_POLL_S)
        log.info("the parent process is gone: stopping")
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="watch-parent", daemon=True).start()
