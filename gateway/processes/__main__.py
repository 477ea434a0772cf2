"""Runs one of the processes of a gateway; its argument describes it (`gateway.child.Child`)."""

from __future__ import annotations

import sys
from pathlib import Path

from gateway import serve
from gateway.child import Child
from gateway.processes.run import run_gateway


def main() -> int:
    """Serve until SIGTERM. Returns the exit code."""
    child = Child.of(sys.argv[1])
    # The parent speaks for all of its processes.
    serve.console.quiet = True
    return run_gateway(Path(child.file), child.overrides, child)


if __name__ == "__main__":
    sys.exit(main())
