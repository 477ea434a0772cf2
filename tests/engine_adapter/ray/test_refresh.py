"""What `Replicas` does with the answers of its actors. A scripted `ray` stands for the cluster."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from engine_adapter.ray.replicas import Replicas, _Slot


class ScriptedError(Exception):
    """Stands for one of Ray's errors."""


class ScriptedActor:
    """An actor that answers from a script; an exception is raised. It says ``report_port`` with every URL."""

    def __init__(self, *urls: Any, report_port: int | None = None) -> None:
        self._urls, self._report_port = list(urls), report_port
        self.stopped = False
        self.address = SimpleNamespace(remote=self._next)
        self.stop = SimpleNamespace(remote=self._stop)

    def _next(self) -> Any:
        url = self._urls.pop(0)
        return url if isinstance(url, Exception) else (url, self._report_port)

    def _stop(self, drain_s: float) -> int:
        self.stopped = True
        return 0


@pytest.fixture(autouse=True)
def scripted_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def get(answer: Any, timeout: float) -> Any:
        if isinstance(answer, Exception):
            raise answer
        return answer

    names = ("ActorDiedError", "GetTimeoutError", "RayActorError")
    exceptions: Any = ModuleType("ray.exceptions")
    for name in names:
        setattr(exceptions, name, ScriptedError if name == "RayActorError" else type(name, (Exception,), {}))
    ray: Any = ModuleType("ray")
    ray.get, ray.kill, ray.exceptions = get, lambda actor: None, exceptions
    ray.util = SimpleNamespace(remove_placement_group=lambda group: None)
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setitem(sys.modules, "ray.exceptions", exceptions)


def replicas(folder: Path, *actors: ScriptedActor) -> Replicas:
    started = Replicas(["server"], len(actors), {"CPU": 1}, folder / "engines.json")
    started._slots = [_Slot(None, actor) for actor in actors]
    return started


def test_stop_drains_a_server_whose_last_probe_failed(tmp_path: Path) -> None:
    busy, starting = ScriptedActor("http://a:1", ""), ScriptedActor("", "")
    running = replicas(tmp_path, busy, starting)
    assert running.refresh() == ["http://a:1"]
    assert running.refresh() == []
    assert running.stop(1) == [0]
    assert (busy.stopped, starting.stopped) == (True, False)


def test_stop_does_not_wait_for_a_server_that_starts_again(tmp_path: Path) -> None:
    lost = ScriptedActor("http://a:1", ScriptedError(), "")
    running = replicas(tmp_path, lost)
    for expected in (["http://a:1"], [], []):
        assert running.refresh() == expected
        assert json.loads((tmp_path / "engines.json").read_text())["engines"] == expected
    assert running.stop(1) == []
    assert not lost.stopped


def test_file_has_the_report_port_of_each_server_that_chose_one(tmp_path: Path) -> None:
    running = replicas(tmp_path, ScriptedActor("http://a:1", report_port=9500), ScriptedActor("http://b:2"))
    assert running.refresh() == ["http://a:1", "http://b:2"]
    entries = json.loads((tmp_path / "engines.json").read_text())["engines"]
    assert entries == [{"url": "http://a:1", "report_port": 9500}, "http://b:2"]
