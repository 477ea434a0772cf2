"""A process that must not outlive the one that started it."""

from __future__ import annotations

import os
import signal
import threading
import time


def exit_with_parent(poll_s: float = 1.0) -> None:
    """Watch the parent from a thread; when it is gone, SIGTERM this process, and SIGKILL it if that takes too long.

    Polled rather than asked of the kernel: Linux's PDEATHSIG fires when the parent's *thread* ends that forked us, and
    the gateway starts its engines from pool threads.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(poll_s)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="exit with parent", daemon=True).start()
