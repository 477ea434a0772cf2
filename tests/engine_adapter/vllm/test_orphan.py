"""A child of the gateway ends with it, whatever the child is doing."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

pytestmark = pytest.mark.process

CHILD = """
import os, signal, sys, time
from engine_adapter.vllm.orphan import exit_with_parent

class Slow:
    def __del__(self):
        time.sleep(60)  # the interpreter's end, when no Python thread runs any more

{before}
exit_with_parent(os.getppid(), poll_s=0.05, grace_s=0.5)
print(os.getpid(), flush=True)
time.sleep(60)
"""
CASES = {
    "waits": "",
    "ignores SIGTERM": "signal.signal(signal.SIGTERM, signal.SIG_IGN)",
    "ends slowly": "slow = Slow(); signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))",
}
PARENT = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"


@pytest.mark.parametrize("before", CASES.values(), ids=CASES)
def test_child_ends_soon_after_its_parent(before: str) -> None:
    command = [sys.executable, "-c", PARENT, CHILD.format(before=before)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        assert int(parent.stdout.readline()) > 0
        started = time.monotonic()
        parent.kill()
        # The pipe closes when the child has ended, too.
        assert parent.stdout.read() == ""
    assert time.monotonic() - started < 20
