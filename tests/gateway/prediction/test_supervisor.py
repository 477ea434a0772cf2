"""A child process that must be there."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from gateway.prediction import supervisor as supervisor_module
from gateway.prediction.supervisor import Supervisor
from gateway.serve import _predictor
from tests.fixtures.live_gateway import eventually, gateway_config

SLEEPER = [sys.executable, "-S", "-c", "import time; time.sleep(60)"]
STUBBORN = [
    sys.executable, "-S", "-c",
    "import signal, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); open(sys.argv[1], 'w'); time.sleep(60)",
]  # fmt: skip


@pytest.fixture(autouse=True)
def short_back_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor_module, "_BACKOFF_S", (0.05, 0.1))


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def test_a_killed_child_is_started_again_and_stop_leaves_no_process() -> None:
    restarted: list[float] = []
    child = Supervisor("child", SLEEPER, on_restart=lambda: restarted.append(time.monotonic()))
    await child.start()
    first = child.pid
    assert first is not None
    os.kill(first, signal.SIGKILL)
    await eventually(lambda: child.restarts == 1)
    second = child.pid
    assert second is not None
    assert second != first
    assert len(restarted) == 1
    await child.stop()
    assert child.pid is None
    assert not is_running(first)
    assert not is_running(second)
    await child.stop()


async def test_a_child_that_dies_at_once_is_started_again_more_and_more_slowly() -> None:
    restarted: list[float] = []
    child = Supervisor("child", ["/bin/false"], on_restart=lambda: restarted.append(time.monotonic()))
    started = time.monotonic()
    await child.start()
    await eventually(lambda: len(restarted) == 3)
    await child.stop()
    gaps = [b - a for a, b in zip([started, *restarted], restarted, strict=False)]
    assert gaps[0] >= 0.05
    assert min(gaps[1:]) >= 0.1


async def test_stop_during_the_back_off_starts_nothing_more() -> None:
    child = Supervisor("child", ["/bin/false"])
    await child.start()
    await asyncio.sleep(0.02)
    await child.stop()
    restarts = child.restarts
    await asyncio.sleep(0.15)
    assert (child.restarts, child.pid) == (restarts, None)


async def test_a_child_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    child = Supervisor("child", [*STUBBORN, str(ready)])
    await child.start()
    pid = child.pid
    assert pid is not None
    await eventually(ready.exists)
    await child.stop(timeout_s=0.1)
    assert not is_running(pid)


async def test_a_command_that_vanishes_is_tried_again_until_it_is_back(tmp_path: Path) -> None:
    command = tmp_path / "command"
    command.symlink_to("/bin/false")
    child = Supervisor("child", [str(command)])
    await child.start()
    command.unlink()
    await asyncio.sleep(0.2)
    command.symlink_to("/bin/false")
    await eventually(lambda: child.restarts >= 1)
    await child.stop()


def test_the_predictor_is_told_where_to_keep_what_it_learns_and_where_to_collect() -> None:
    supervisor, url = _predictor(gateway_config(predictor={}), "/scratch")
    assert supervisor is not None
    assert url is not None
    assert supervisor._command[-2:] == ["--state", "/scratch"]
    section = {"state_dir": "/state", "collect_dir": "/lengths", "collect_limit_mb": 64}
    supervisor, _ = _predictor(gateway_config(predictor=section), "/scratch")
    assert supervisor is not None
    assert supervisor._command[-6:] == ["--state", "/state", "--collect", "/lengths", "--collect-limit-mb", "64"]
    assert _predictor(gateway_config(predictor={"url": "http://elsewhere/"}), "/scratch") == (None, "http://elsewhere")
    assert _predictor(gateway_config(predictor={"enabled": False}), "/scratch") == (None, None)
