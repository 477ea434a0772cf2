"""`python -m engine_adapter.ray`: what it refuses, and which cluster it uses."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from engine_adapter.ray import __main__ as command

SERVER = ["--", "server", "--port", "{port}"]


class Joined(Exception):  # noqa: N818 - not an error
    """Ends the command where it joins a cluster."""


def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *options: str) -> dict[str, Any]:
    """Run the command until it joins a cluster; return how it does."""
    seen: dict[str, Any] = {}

    def init(**kwargs: Any) -> None:
        seen.update(kwargs)
        raise Joined

    scripted_ray = ModuleType("ray")
    scripted_ray.init = init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ray", scripted_ray)
    monkeypatch.setattr(sys, "argv", ["ray", "--file", str(tmp_path / "engines.json"), *options, *SERVER])
    with pytest.raises(Joined):
        command.main()
    return seen


def test_command_without_an_address_starts_a_cluster_of_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert run(monkeypatch, tmp_path)["address"] == "local"
    assert run(monkeypatch, tmp_path, "--address", "auto")["address"] == "auto"


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
