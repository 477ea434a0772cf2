"""`python -m engine_adapter.ray`: what it refuses, which cluster it uses, and how it ends."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from engine_adapter.ray import __main__ as command

SERVER = ["--", "server", "--port", "{port}"]


class ScriptedReplicas:
    """Fails in its first refresh, and gets SIGTERM in the second one. ``ends``: raised by `start`."""

    host: str | None
    ends: Exception | None = None

    def __init__(self, command: Any, count: int, bundle: Any, file: Path, host: str | None, start_s: float) -> None:
        self.host, self.start_s = host, start_s
        self.refreshed, self.drained_s = 0, -1.0
        made.append(self)

    def start(self) -> None:
        if self.ends is not None:
            raise self.ends

    def refresh(self) -> None:
        self.refreshed += 1
        if self.refreshed == 1:
            raise OSError(28, "No space left on device")
        signal.raise_signal(signal.SIGTERM)

    def stop(self, drain_s: float) -> None:
        self.drained_s = drain_s


made: list[ScriptedReplicas] = []


@pytest.fixture(autouse=True)
def scripted(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Replace Ray and the servers; returns how the command joins a cluster."""
    joined: dict[str, Any] = {}
    ray: Any = ModuleType("ray")
    ray.init, ray.shutdown = joined.update, lambda: None
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setattr(command, "Replicas", ScriptedReplicas)
    monkeypatch.setattr(command, "REFRESH_S", 0.001)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield joined
    made.clear()
    for number, handler in handlers.items():
        signal.signal(number, handler)


def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *options: str) -> ScriptedReplicas:
    """Run the command until it ends; return its servers."""
    monkeypatch.setattr(sys, "argv", ["ray", "--file", str(tmp_path / "engines.json"), *options, *SERVER])
    command.main()
    return made[-1]


def test_command_without_an_address_starts_a_cluster_of_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, scripted: dict[str, Any]
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    run(monkeypatch, tmp_path)
    assert scripted["address"] == "local"
    run(monkeypatch, tmp_path, "--address", "auto")
    assert scripted["address"] == "auto"


def test_only_servers_of_a_joined_cluster_listen_on_the_network(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert run(monkeypatch, tmp_path).host == "127.0.0.1"
    assert run(monkeypatch, tmp_path, "--address", "auto").host is None


def test_command_goes_on_after_an_error_and_drains_at_sigterm(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    replicas = run(monkeypatch, tmp_path, "--drain-s", "7")
    assert (replicas.refreshed, replicas.drained_s) == (2, 7)
    assert "No space left on device" in caplog.text


def test_command_stops_the_servers_when_it_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(ScriptedReplicas, "ends", RuntimeError("no cluster"))
    with pytest.raises(RuntimeError, match="no cluster"):
        run(monkeypatch, tmp_path)
    assert made[-1].drained_s == 120


def test_file_in_a_folder_that_does_not_exist_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run(monkeypatch, tmp_path / "absent")
    assert f"there is no folder {tmp_path / 'absent'}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "resource", ["engine", "engine=", "=1", "engine=one", "engine=0", "engine=-1", "engine=inf", "engine=nan"]
)
def test_resource_without_an_amount_is_refused(
    resource: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["ray", "--file", str(tmp_path / "f"), "--resource", resource, *SERVER])
    with pytest.raises(SystemExit):
        command.main()
    assert f"'{resource}' is not NAME=AMOUNT" in capsys.readouterr().err


def test_resource_has_a_name_and_an_amount() -> None:
    assert command._resource("engine=0.5") == ("engine", 0.5)
