"""Tells systemd what the service does (`sd_notify(3)`), if systemd started it with ``Type=notify``."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time


def notify(**state: object) -> bool:
    """Send assignments such as ``READY=1`` to systemd. Returns whether it was sent; without systemd nothing is."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if path[:1] not in ("/", "@"):
        return False
    message = "\n".join(f"{name}={str(value).replace(chr(10), ' ')}" for name, value in state.items())
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
            # "@" stands for the zero byte of an abstract socket.
            channel.connect(path.replace("@", "\0", 1) if path[0] == "@" else path)
            channel.setblocking(False)
            channel.sendall(message.encode())
    except OSError:
        return False
    return True


def reloading() -> None:
    """Tell systemd that the configuration is being read again, until the next ``READY=1``."""
    notify(RELOADING=1, MONOTONIC_USEC=time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000)


async def keep_watchdog() -> None:
    """Tell systemd twice per ``WatchdogSec=`` that the event loop runs, until cancelled. Returns at once without it."""
    with contextlib.suppress(ValueError):
        interval_s = int(os.environ.get("WATCHDOG_USEC", "0")) / 2e6
        while interval_s > 0 and os.environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid()):
            notify(WATCHDOG=1)
            await asyncio.sleep(interval_s)
