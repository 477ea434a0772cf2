"""What `Replicas` does with the answers of its actors. A scripted `ray` stands for the cluster."""

from __future__ import annotations

import json
import stat
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from engine_adapter.ray.replicas import HUNG_S, LOST_PROBES, LOST_S, Replicas, _Slot

A, B = "http://a:1", "http://b:2"


class RayError(Exception):
    pass


class RayActorError(RayError):
    pass


class ActorDiedError(RayActorError):
    pass


class GetTimeoutError(RayError):
    pass


class RayTaskError(RayError):
    pass


class ScriptedActor:
    """An actor that answers probes with ``now``: URL and health of its server. An exception is raised."""

    def __init__(self, url: str = A, *, healthy: bool = True, report_port: int | None = None) -> None:
        self.now: Any = (url, report_port, healthy)
        self.stopped = self.killed = False
        self.probe = SimpleNamespace(remote=lambda: self.now)
        self.stop = SimpleNamespace(remote=self._stop)

    def answers(self, url: str = A, *, healthy: bool = True) -> None:
        self.now = (url, None, healthy)

    def fails(self, error: Exception) -> None:
        self.now = error

    def _stop(self, drain_s: float) -> int:
        self.stopped = True
        return 0


class ScriptedReplicas(Replicas):
    """Runs scripted actors by a scripted clock. ``spare``: those that replace others, in turn."""

    def __init__(self, folder: Path, *actors: ScriptedActor, start_s: float = 1000) -> None:
        self.now_s = 0.0
        file = folder / "engines.json"
        super().__init__(["server"], len(actors), {}, file, start_s=start_s, clock=lambda: self.now_s)
        self._slots = [_Slot(None, actor) for actor in actors]
        self.spare: list[ScriptedActor] = []

    def _new_slot(self) -> _Slot:
        return _Slot(None, self.spare.pop(0))

    def after(self, seconds: float) -> list[str]:
        """Refresh once ``seconds`` later; return the URLs in the file."""
        self.now_s += seconds
        urls = self.refresh()
        assert [entry["url"] if isinstance(entry, dict) else entry for entry in written(self)] == urls
        return urls


def written(running: Replicas) -> list[Any]:
    return list(json.loads(running.file.read_text())["engines"])


@pytest.fixture(autouse=True)
def scripted_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def get(answer: Any, timeout: float) -> Any:
        if isinstance(answer, Exception):
            raise answer
        return answer

    def kill(actor: ScriptedActor) -> None:
        actor.killed = True

    exceptions: Any = ModuleType("ray.exceptions")
    for error in (RayError, RayActorError, ActorDiedError, GetTimeoutError):
        setattr(exceptions, error.__name__, error)
    ray: Any = ModuleType("ray")
    ray.get, ray.kill, ray.cancel, ray.exceptions = get, kill, lambda answer: None, exceptions
    ray.util = SimpleNamespace(remove_placement_group=lambda group: None)
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setitem(sys.modules, "ray.exceptions", exceptions)


UNANSWERED = [
    pytest.param((A, None, False), id="slow /health"),
    pytest.param(GetTimeoutError(), id="busy actor"),
    pytest.param(RayActorError(), id="connection to the actor lost"),
    pytest.param(RayTaskError("http.client.BadStatusLine"), id="odd answer to /health"),
]


@pytest.mark.parametrize("failure", UNANSWERED)
def test_server_stays_in_the_file_until_several_probes_over_seconds_fail(tmp_path: Path, failure: Any) -> None:
    actor = ScriptedActor()
    running = ScriptedReplicas(tmp_path, actor)
    assert running.after(1) == [A]
    actor.now = failure
    for _ in range(LOST_PROBES + 1):
        assert running.after(1) == [A]
    assert running.after(LOST_S - LOST_PROBES - 1) == []
    actor.answers()
    assert running.after(1) == [A]
    assert not actor.killed


def test_server_stays_in_the_file_when_the_launcher_was_suspended(tmp_path: Path) -> None:
    actor = ScriptedActor()
    running = ScriptedReplicas(tmp_path, actor)
    assert running.after(1) == [A]
    actor.answers(healthy=False)
    assert running.after(10 * HUNG_S) == [A]
    assert not actor.killed


def test_server_that_was_started_again_leaves_the_file_at_once(tmp_path: Path) -> None:
    actor = ScriptedActor(A)
    running = ScriptedReplicas(tmp_path, actor)
    assert running.after(1) == [A]
    actor.answers(B, healthy=False)
    assert running.after(1) == []
    actor.answers(B)
    assert running.after(1) == [B]


def test_lost_actor_leaves_the_file_at_once_and_is_replaced(tmp_path: Path) -> None:
    lost, new = ScriptedActor(A), ScriptedActor(B)
    running = ScriptedReplicas(tmp_path, lost)
    running.spare = [new]
    assert running.after(1) == [A]
    lost.fails(ActorDiedError())
    assert running.after(1) == []
    assert running.after(1) == [B]


@pytest.mark.parametrize("failure", UNANSWERED)
def test_hung_server_is_replaced(tmp_path: Path, failure: Any) -> None:
    hung, new, other = ScriptedActor(A), ScriptedActor("http://new:3"), ScriptedActor(B)
    running = ScriptedReplicas(tmp_path, hung, other)
    running.spare = [new]
    assert running.after(1) == [A, B]
    hung.now = failure
    for _ in range(int(HUNG_S) - 1):
        running.after(1)
        assert not hung.killed
    assert running.after(1) == [B]
    assert hung.killed
    assert running.after(1) == ["http://new:3", B]
    assert not other.killed


def test_server_that_never_answers_is_replaced_after_its_time_to_start(tmp_path: Path) -> None:
    slow, hung, new = ScriptedActor(A, healthy=False), ScriptedActor(B, healthy=False), ScriptedActor("http://new:3")
    running = ScriptedReplicas(tmp_path, slow, hung, start_s=1000)
    running.spare = [new]
    for _ in range(10):
        assert running.after(100) == []
    slow.answers(A)
    assert (hung.killed, running.after(100)) == (False, [A])
    assert hung.killed
    assert running.after(1) == [A, "http://new:3"]


def test_actor_that_waits_for_resources_is_not_replaced(tmp_path: Path) -> None:
    waiting = ScriptedActor()
    waiting.fails(GetTimeoutError())
    running = ScriptedReplicas(tmp_path, waiting, start_s=1000)
    for _ in range(10):
        assert running.after(1000) == []
    # Its time to start begins when the actor runs.
    waiting.answers(healthy=False)
    assert running.after(1) == []
    assert not waiting.killed


def test_stop_drains_a_server_whose_last_probes_failed(tmp_path: Path) -> None:
    busy, starting = ScriptedActor(A), ScriptedActor(B, healthy=False)
    running = ScriptedReplicas(tmp_path, busy, starting)
    assert running.after(1) == [A]
    busy.answers(healthy=False)
    for _ in range(LOST_PROBES):
        running.after(LOST_S)
    assert written(running) == []
    assert running.stop(1) == [0]
    assert (busy.stopped, starting.stopped) == (True, False)


def test_stop_does_not_wait_for_a_server_that_starts_again(tmp_path: Path) -> None:
    lost = ScriptedActor(A)
    running = ScriptedReplicas(tmp_path, lost)
    assert running.after(1) == [A]
    lost.answers(B, healthy=False)
    assert running.after(1) == []
    assert running.stop(1) == []
    assert not lost.stopped


def test_stop_ends_the_other_actors_when_one_fails(tmp_path: Path) -> None:
    failing, other = ScriptedActor(A), ScriptedActor(B)
    running = ScriptedReplicas(tmp_path, failing, other)
    assert running.after(1) == [A, B]
    failing.stop = SimpleNamespace(remote=lambda drain_s: RayTaskError())
    assert running.stop(1) == [0]
    assert failing.killed
    assert other.killed


def test_file_has_the_report_port_of_each_server_that_chose_one(tmp_path: Path) -> None:
    running = ScriptedReplicas(tmp_path, ScriptedActor(A, report_port=9500), ScriptedActor(B))
    assert running.after(1) == [A, B]
    assert written(running) == [{"url": A, "report_port": 9500}, B]


def test_file_is_private_and_does_not_follow_a_link(tmp_path: Path) -> None:
    target, folder = tmp_path / "target", tmp_path / "folder"
    folder.mkdir()
    target.write_text("untouched")
    (folder / "engines.json").symlink_to(target)
    (folder / ".engines.json.new").symlink_to(target)
    running = ScriptedReplicas(folder, ScriptedActor())
    assert running.after(1) == [A]
    assert stat.S_IMODE(running.file.lstat().st_mode) == 0o600
    assert target.read_text() == "untouched"


def test_file_that_cannot_be_written_is_written_again(tmp_path: Path) -> None:
    running = ScriptedReplicas(tmp_path / "folder", ScriptedActor())
    with pytest.raises(FileNotFoundError):
        running.after(1)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "engines.json").mkdir()
    with pytest.raises(IsADirectoryError):
        running.after(1)
    (tmp_path / "folder" / "engines.json").rmdir()
    assert running.after(1) == [A]
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["engines.json"]
