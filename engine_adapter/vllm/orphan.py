"""A process that must not outlive the one that started it."""

from __future__ import annotations

import os
import signal
import threading
import time

PARENT_ENV = "ANTARES_GATEWAY_PID"
"""Environment variable by which a gateway tells its children who their parent is."""


def exit_with_parent(parent: int, poll_s: float = 1.0) -> None:
    """Watch from a thread whether ``parent`` (a pid) is still our parent; if not, end this process.

    SIGTERM first, SIGKILL ten seconds later.

    Polled rather than asked of the kernel: Linux's PDEATHSIG fires when the parent's *thread* ends that forked us, and
    the gateway starts its engines from pool threads.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(poll_s)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="exit with parent", daemon=True).start()
