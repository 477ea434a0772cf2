"""`antares simulate --config`: the SLO classes, policy and routing of a gateway's configuration."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from lab.cli import app
from lab.simulate.experiment import Experiment, parse_policy
from lab.simulate.gateway_config import read_settings

CLASSES = """\
engines: [{kind: http, base_url: 'http://a'}]
classes:
  chat: {ttft_ms: 1000, tpot_ms: 50}
  batch: {e2e_ms: 60000, on_unattainable: best_effort}
  free: {}
default_class: chat
keys_file: keys.json
"""
POLICY = "policy: {name: scorpio, options: {eta: 1.6, tpot_guard: false}}\nrouting: {name: headroom}\n"
QUICK = ("--workload", "small", "--requests", "40", "--max-output", "40", "--qps", "30")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "antares.yaml"
    path.write_text(CLASSES + POLICY)
    return path


def antares(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["simulate", *map(str, arguments)])


def runs(*arguments: str | Path) -> list[dict[str, Any]]:
    result = antares(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    found: list[dict[str, Any]] = json.loads(result.stdout)["runs"]
    return found


def test_read_settings_returns_classes_policy_and_routing_without_the_keys_file(config: Path) -> None:
    settings = read_settings(config)
    assert [(one.name, one.on_unattainable) for one in settings.classes] == [
        ("chat", "reject"), ("batch", "best_effort"), ("free", "reject"),
    ]  # fmt: skip
    assert settings.slo_table() == ((1.0, 50.0, math.inf), (math.inf, math.inf, 60.0), (math.inf, math.inf, math.inf))
    (policy,) = settings.policies
    assert parse_policy(policy) == parse_policy("scorpio:eta=1.6,tpot_guard=false")
    assert settings.routing == "headroom"


def test_requests_have_the_classes_of_the_file_by_mix(config: Path) -> None:
    (run,) = runs(*QUICK, "--config", config)
    assert set(run["class_names"].values()) == {"chat", "batch", "free"}
    assert run["policy"] == "scorpio:eta=1.6,tpot_guard=False"
    (run,) = runs(*QUICK, "--config", config, "--mix", "free=1,chat=3")
    assert set(run["class_names"].values()) == {"chat", "free"}
    assert run["per_class"]["1"]["requests"] > run["per_class"]["3"]["requests"]


@pytest.fixture
def experiments(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Experiment, list[str]]]:
    """Experiments and policies that the command would run."""
    found: list[tuple[Experiment, list[str]]] = []

    def check(experiment: Experiment, policies: list[str], *rest: Any) -> None:
        found.append((experiment, policies))
        raise ValueError("stop here")

    monkeypatch.setattr("lab.simulate.checks.check", check)
    return found


def test_options_take_precedence_over_policy_and_routing_of_the_file(
    config: Path, experiments: list[tuple[Experiment, list[str]]]
) -> None:
    antares("--config", config)
    antares("--config", config, "--policy", "s3", "--routing", "least_load")
    config.write_text(CLASSES)
    antares("--config", config)
    antares("--config", config, "--replicas", "search")
    assert [(experiment.routing, policies) for experiment, policies in experiments] == [
        ("headroom", ["scorpio:eta=1.6,tpot_guard=False"]),
        ("least_load", ["s3"]),
        ("least_load", ["fcfs", "slack"]),
        ("least_load", ["slack"]),
    ]


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    lines = [
        {"timestamp": at, "input_length": 10, "output_length": 5, "block_tokens": 64, "hash_ids": [], "model": "m",
         "slo_class": name, "slo_ttft_ms": 7.0, "slo_tpot_ms": None, "slo_e2e_ms": None}
        for at, name in enumerate(["batch", "chat"])
    ]  # fmt: skip
    path = tmp_path / "traffic.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_recorded_requests_get_the_bounds_of_their_class(config: Path, recording: Path) -> None:
    workload = {"name": str(recording), "arrivals": "trace", "slo_scale": 2.0}
    batch, chat = Experiment(workload=workload, classes=read_settings(config).classes).requests(None, 0)
    assert (batch.slo_class, batch.ttft_slo_s, batch.e2e_slo_s, batch.best_effort) == ("batch", math.inf, 120.0, True)
    assert (chat.slo_class, chat.ttft_slo_s, chat.tpot_slo_s, chat.best_effort) == ("chat", 2.0, 0.1, False)


def test_unattainable_requests_of_a_best_effort_class_are_served(config: Path) -> None:
    def rejected(on_unattainable: str) -> float:
        config.write_text(CLASSES.replace("e2e_ms: 60000", "ttft_ms: 1").replace("best_effort", on_unattainable))
        (run,) = runs(*QUICK, "--config", config, "--policy", "slack", "--mix", "batch=1")
        return float(run["rejected"])

    assert (rejected("reject"), rejected("best_effort")) == (1.0, 0.0)


@pytest.mark.parametrize(
    ("text", "options", "error"),
    [
        ("engines: [{kind: simulated}]\ndefault_class: chat\n", (), "has no SLO classes: add `classes`"),
        (CLASSES.replace("classes:", "clases:"), (), "has no SLO classes: add `classes`"),
        (CLASSES.replace("ttft_ms: 1000, tpot_ms: 50", "").replace("e2e_ms: 60000, ", ""), (), "has a bound, so any"),
        (CLASSES.replace("ttft_ms", "tfft_ms"), (), "classes.chat.tfft_ms: unknown key; did you mean `ttft_ms`?"),
        (CLASSES, ("--slo-table", "llama-3.1-8b"), "remove --slo-table, or --config"),
        (CLASSES, ("--mix", "gold=1"), "CLASS=WEIGHT,... with the classes of --config, which are chat, batch, free"),
        (CLASSES, ("--mix", "1=1"), "CLASS=WEIGHT"),
    ],
)
def test_unusable_file_or_contradiction_exits_2_and_says_what_to_change(
    config: Path, text: str, options: tuple[str, ...], error: str
) -> None:
    config.write_text(text)
    result = antares("--config", config, *options)
    assert result.exit_code == 2
    assert error in " ".join(result.stderr.split())


def test_class_of_a_recording_that_the_file_lacks_exits_2(config: Path, recording: Path) -> None:
    config.write_text(CLASSES.replace("batch:", "bulk:"))
    result = antares("--trace", recording, "--config", config)
    assert result.exit_code == 2
    assert "requests of class 'batch', and --config has only the classes chat, bulk, free" in " ".join(
        result.stderr.split()
    )
