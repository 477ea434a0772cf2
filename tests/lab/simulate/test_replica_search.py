"""The fewest replicas for a workload, by the command and by its search."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from engine_adapter.step_time.profile import load_profile
from gateway.cli import app
from lab.simulate import replica_search
from lab.simulate.experiment import Experiment
from lab.simulate.replica_search import busy_replicas, fewest_replicas, is_feasible
from lab.workload import WorkloadRequest


def _scripted(monkeypatch: pytest.MonkeyPatch, needed: int) -> list[int]:
    """Have ``needed`` replicas keep the target; return the list of what is tried."""
    tried: list[int] = []

    def perform_all(experiment: Experiment, runs: list[Any], jobs: int) -> list[dict[str, Any]]:
        tried.append(experiment.replicas)
        adherence = 1.0 if experiment.replicas >= needed else 0.5
        return [{"slo_adherence": adherence, "utilisation": min(1.0, 8 / experiment.replicas)} for _ in runs]

    monkeypatch.setattr(replica_search, "perform_all", perform_all)
    return tried


@pytest.mark.parametrize("needed", [1, 2, 3, 7, 40, 64])
@pytest.mark.parametrize("first", [1, 5, 64])
def test_search_finds_the_fewest_wherever_it_begins(monkeypatch: pytest.MonkeyPatch, needed: int, first: int) -> None:
    tried = _scripted(monkeypatch, needed)

    found = fewest_replicas(Experiment(), "slack", 1.0, [0], 0.99, first=first, most=64)

    assert found.replicas == needed
    assert len(tried) == len(set(tried)) <= 13


def test_search_says_if_the_most_are_not_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    _scripted(monkeypatch, 65)

    assert fewest_replicas(Experiment(), "slack", 1.0, [0], 0.99, first=3, most=64).replicas is None


def test_search_ends_where_engines_idle_and_the_target_is_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    _scripted(monkeypatch, 2000)

    found = fewest_replicas(Experiment(), "slack", 1.0, [0], 0.99, first=1)

    assert found.saturated
    assert found.replicas == 81  # utilisation 8 / 81 is the first below 0.1


def test_request_is_feasible_if_an_idle_engine_attains_it() -> None:
    slow, fast = (load_profile(name) for name in ("a100-llama3.1-8b", "h200-llama3.1-8b"))
    prompt = WorkloadRequest(0.0, 6000, 10, 0.2, 0.05, 1)

    assert not is_feasible(prompt, [slow])
    assert is_feasible(prompt, [slow, fast])
    assert not is_feasible(WorkloadRequest(0.0, 10, 10, 1.0, 0.001, 1), [slow, fast])
    assert not is_feasible(WorkloadRequest(0.0, 10, 1000, 1.0, 0.05, 1, e2e_slo_s=1.0), [slow, fast])


def test_search_tries_at_least_one_replica_of_each_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = _scripted(monkeypatch, 1)

    found = fewest_replicas(Experiment(profiles=("h200-llama3.1-8b",)), "slack", 1.0, [0], 0.99, first=1)

    assert found.replicas == 2
    assert min(tried) == 2


def test_first_guess_grows_with_the_rate() -> None:
    experiment = Experiment(workload={"name": "sharegpt", "duration_s": 30.0})

    low, high = (busy_replicas(experiment, experiment.requests(qps, 0)) for qps in (20.0, 200.0))

    assert 1 <= low <= 2
    assert 6 * low <= high <= 14 * low


def test_command_sizes_a_trace_that_is_not_shipped_and_draws_it(tmp_path: Path) -> None:
    trace, plot = tmp_path / "traffic.jsonl", tmp_path / "traffic.svg"
    trace.write_text(
        "".join(
            json.dumps({"timestamp": 40 * n, "input_length": 600, "output_length": 60, "hash_ids": [n % 3, 10 + n]})
            + "\n"
            for n in range(250)
        )
    )
    arguments = ["simulate", "--trace", str(trace), "--replicas", "search", "--json", "--plot", str(plot)]

    run = CliRunner().invoke(app, arguments)

    assert run.exit_code == 0, run.output
    document = json.loads(run.stdout)
    needed = document["replicas"]["slack"]
    by_replicas = {record["replicas"]: record for record in document["runs"]}
    assert by_replicas[needed]["slo_adherence"] >= 0.99
    assert needed == 1 or by_replicas[needed - 1]["slo_adherence"] < 0.99
    assert by_replicas[needed]["hit_rate"] > 0.5
    assert len(by_replicas[needed]["timeline"]) == 60
    assert plot.read_text().startswith("<?xml")


def test_command_prints_gpus_and_adherence_by_class() -> None:
    run = CliRunner().invoke(
        app, ["simulate", "--qps", "30", "--requests", "300", "--replicas", "search", "--target", "0.95"]
    )

    assert run.exit_code == 0, run.output
    assert re.search(
        r"1 replica of a100-llama3.1-8b for 30 requests/s \(300 in 10 s\) at 95% SLO adherence", run.output
    )
    assert "class" in run.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--replicas", "many"], "a number from 1 to 1024, or search"),
        (["--replicas", "0"], "a number from 1 to 1024"),
        (["--replicas", "search", "--target", "0"], "--target is a fraction"),
        (["--replicas", "search", "--hold", "0.9"], "remove --hold"),
        (["--replicas", "search", "--fail", "5:1"], "replica 0 only"),
        (["--replicas", "search", "--qps", "1", "--qps", "2"], "one --qps"),
        (["--trace", "nowhere.jsonl"], "No such file"),
        (["--trace", "azure-conv", "--arrivals", "trace", "--trace-unit", "s"], "describe a file"),
    ],
)
def test_command_refuses_options_that_do_not_fit(options: list[str], message: str) -> None:
    run = CliRunner().invoke(app, ["simulate", *options])

    assert run.exit_code == 2
    assert message in " ".join(run.output.split())
