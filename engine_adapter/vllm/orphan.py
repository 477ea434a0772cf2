"""Ends a child process when its parent process ends."""

from __future__ import annotations

import os
import signal
import threading
import time

PARENT_ENV = "ANTARES_GATEWAY_PID"
"""Environment variable with the gateway's pid, for its child processes."""


def exit_with_parent(parent: int, poll_s: float = 1.0, grace_s: float = 10.0) -> None:
    """Start a thread that ends this process once ``parent`` (a pid) is no longer its parent.

    It sends SIGTERM, and SIGALRM and SIGKILL after ``grace_s``.

    NOTE: it polls every ``poll_s`` seconds instead of using Linux's PDEATHSIG. That signal fires when the parent
    *thread* ends, and the gateway starts its engines from pool threads.
    """

    def watch_parent() -> None:
        while os.getppid() == parent:
            time.sleep(poll_s)
        # NOTE: SIGTERM may begin the interpreter's end, in which no thread runs any more. SIGALRM needs none.
        signal.setitimer(signal.ITIMER_REAL, grace_s)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(grace_s)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch_parent, name="exit with parent", daemon=True).start()
