"""The predictor as a process: one uvicorn worker, quiet logs, an orderly end.

Ends with status 0 on SIGTERM or SIGINT after the calls in flight are answered, and, when asked to, once the
process that started it is gone.
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
"""How often an ``--exit-with-parent`` process looks for its parent.

Polling, not PR_SET_PDEATHSIG: that one fires when the parent's *thread* ends, and a gateway may start us from
any.
"""


class CannotListen(Exception):  # noqa: N818 - it names what happened
    """The address cannot be bound; the message says which and why."""


@dataclass(slots=True, frozen=True)
class LearningFolders:
    """``state``: where corrections survive a restart. ``collect``: where finished requests' features and lengths go, at
    most ``collect_limit_bytes`` of them. None: neither."""

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
    """Serve until told to stop.

    Raises `predictor_service.model.length_model.ModelUnusable`, `CannotListen` when the address is taken or not
    ours, and
    `predictor_service.calibration.state.StateUnusable`; OSError when the folder to collect in cannot be made.
    """
    if exit_with_parent:
        _watch_parent(os.getppid())
    for number in (signal.SIGTERM, signal.SIGINT):
        # Before uvicorn takes the signals over, and after: it raises them again once it has shut down.
        signal.signal(number, _leave)
    logging.basicConfig(
        stream=sys.stderr, level=log_level.upper(), format="%(asctime)s %(levelname)s %(name)s %(message)s"
    )
    served = load_model(model)
    learning = Learning(
        state=CalibrationState(folders.state, fingerprint(served.name, model)) if folders.state else None,
        collector=Collector(folders.collect, folders.collect_limit_bytes) if folders.collect else None,
    )

    import uvicorn

    from predictor_service.serving.app import create_app

    listening = _listen(host, port)
    log.info("serving %s on http://%s:%d", served.name, host, port)
    config = uvicorn.Config(
        create_app(served, limits, learning, known_models),
        access_log=False,
        log_config=None,
        log_level=log_level.lower(),
        server_header=False,
        # Longer than any client keeps an idle connection, so that it is never we who close one just being used.
        timeout_keep_alive=75,
        timeout_graceful_shutdown=5,
    )
    uvicorn.Server(config).run(sockets=[listening])


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as refused:
        raise CannotListen(
            f"cannot listen on {host}:{port}: {refused.strerror}. Choose another --host or --port"
        ) from None


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(0)


def _watch_parent(parent: int) -> None:
    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_POLL_S)
        log.info("the process that started the predictor is gone: stopping")
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="watch-parent", daemon=True).start()
