"""The supervisor restarts and stops its child process."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from gateway.predictor_process import supervised_predictor
from gateway.supervisor import Supervisor
from tests.fixtures.live_gateway import gateway_config
from tests.fixtures.live_server import eventually

pytestmark = pytest.mark.process

SLEEPER = [sys.executable, "-S", "-c", "import time; time.sleep(60)"]
IGNORES_SIGTERM = [
    sys.executable, "-S", "-c",
    "import signal, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); open(sys.argv[1], 'w'); time.sleep(60)",
]  # fmt: skip


def supervise(command: list[str], on_restart: Callable[[], None] = lambda: None) -> Supervisor:
    return Supervisor("child", command, on_restart, backoff_s=(0.05, 0.1))


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def test_supervisor_restarts_a_killed_child_until_stopped() -> None:
    restarted: list[float] = []
    child = supervise(SLEEPER, lambda: restarted.append(time.monotonic()))
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


async def test_supervisor_backs_off_when_the_child_exits_at_once() -> None:
    restarted: list[float] = []
    child = supervise(["/bin/false"], lambda: restarted.append(time.monotonic()))
    started = time.monotonic()
    await child.start()
    await eventually(lambda: len(restarted) == 3)
    await child.stop()
    gaps = [b - a for a, b in zip([started, *restarted], restarted, strict=False)]
    assert gaps[0] >= 0.05
    assert min(gaps[1:]) >= 0.1


async def test_stop_during_back_off_prevents_the_restart() -> None:
    child = supervise(["/bin/false"])
    await child.start()
    await asyncio.sleep(0.02)
    await child.stop()
    restarts = child.restarts
    await asyncio.sleep(0.15)
    assert (child.restarts, child.pid) == (restarts, None)


async def test_stop_kills_a_child_that_ignores_sigterm(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    child = supervise([*IGNORES_SIGTERM, str(ready)])
    await child.start()
    pid = child.pid
    assert pid is not None
    await eventually(ready.exists)
    await child.stop(timeout_s=0.1)
    assert not is_running(pid)


async def test_supervisor_retries_while_the_command_is_missing(tmp_path: Path) -> None:
    command = tmp_path / "command"
    command.symlink_to("/bin/false")
    child = supervise([str(command)])
    await child.start()
    command.unlink()
    await asyncio.sleep(0.2)
    command.symlink_to("/bin/false")
    await eventually(lambda: child.restarts >= 1)
    await child.stop()


def test_supervised_predictor_gets_a_folder_until_the_gateway_ends() -> None:
    with ExitStack() as stack:
        supervisor, _ = supervised_predictor(gateway_config(predictor={}), stack)
        assert supervisor is not None
        state = Path(supervisor.command[-1])
        assert supervisor.command[-2] == "--state"
        assert state.is_dir()
    assert not state.exists()


def test_supervised_predictor_gets_the_configured_folders() -> None:
    section = {"state_dir": "/state", "collect_dir": "/lengths", "collect_limit_mb": 64}
    supervisor, _ = supervised_predictor(gateway_config(predictor=section), ExitStack())
    assert supervisor is not None
    assert supervisor.command[-6:] == ["--state", "/state", "--collect", "/lengths", "--collect-limit-mb", "64"]


def test_supervised_predictor_is_none_for_a_remote_or_disabled_one() -> None:
    remote, disabled = gateway_config(predictor={"url": "http://remote/"}), gateway_config(predictor={"enabled": False})
    assert supervised_predictor(remote, ExitStack()) == (None, "http://remote")
    assert supervised_predictor(disabled, ExitStack()) == (None, None)
