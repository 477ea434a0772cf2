"""Runs a server in a process group of its own, and leaves none of its processes behind: `python supervisor.py COMMAND`.

SIGTERM and SIGINT go to the server. SIGHUP kills its whole group, and so does the end of the parent process: Ray then
counts the resources of the server as free, such as its GPUs. A file of its own, which imports nothing of ours.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from types import FrameType

PR_SET_PDEATHSIG = 1


def _signal_at_end_of_parent(number: int) -> None:
    """Have the kernel send the signal ``number`` when the thread ends that started this process. Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


def main() -> int:
    """Return the server's exit code; 128 more than the number of a signal that ended it, as shells do."""
    started_by = os.getppid()
    server: subprocess.Popen[bytes] | None = None
    is_over = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal is_over
        if server is None:
            is_over = True
        elif number == signal.SIGHUP:
            kill()
        else:
            server.send_signal(number)

    def kill() -> None:
        if server is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)

    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    for number in numbers:
        signal.signal(number, stop)
    _signal_at_end_of_parent(signal.SIGHUP)
    if os.getppid() != started_by:
        return 1
    try:
        server = subprocess.Popen(
            sys.argv[1:],
            start_new_session=True,
            preexec_fn=lambda: _signal_at_end_of_parent(signal.SIGKILL),  # noqa: PLW1509 - there is one thread
        )
    except OSError as error:
        sys.stderr.write(f"{sys.argv[1]}: {error.strerror}\n")
        return 127
    if is_over:
        kill()
    code = server.wait()
    for number in numbers:
        # NOTE: otherwise a signal while the interpreter ends would replace the exit code.
        signal.signal(number, signal.SIG_IGN)
    # The server's own processes, such as vLLM's EngineCore.
    kill()
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
