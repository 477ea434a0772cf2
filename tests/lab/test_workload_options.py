"""What the measuring commands' options ask of `make_workload`."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from lab.bench.cli import bench
from lab.simulate.cli import simulate
from lab.workload import make_workload
from lab.workload_options import workload_arguments

OPTIONS: dict[str, Any] = {
    "requests": None, "duration": None, "arrivals": "poisson", "burstiness": 1.0, "trace": None, "speed": 1.0,
    "window": None, "slo_table": "llama-3.1-8b", "slo_scale": 1.0, "mix": None, "max_prompt": None, "max_output": None,
}  # fmt: skip


@pytest.mark.parametrize("command", [bench, simulate])
def test_a_commands_options_are_all_that_a_workload_takes(command: Any) -> None:
    options = {name: parameter.default for name, parameter in inspect.signature(command).parameters.items()}
    assert {name: options[name] for name in OPTIONS} == OPTIONS
    arguments = workload_arguments(options)
    assert arguments.keys() | {"name", "qps", "seed"} == inspect.signature(make_workload).parameters.keys()


def test_bursts_are_asked_for_by_their_burstiness_alone() -> None:
    assert workload_arguments(OPTIONS)["arrivals"] == "poisson"
    assert workload_arguments({**OPTIONS, "burstiness": 3.0})["arrivals"] == "gamma"
    assert workload_arguments({**OPTIONS, "burstiness": 3.0, "arrivals": "trace"})["arrivals"] == "trace"


@pytest.mark.parametrize(
    ("told", "duration_s"),
    [({}, 60.0), ({"duration": 5.0}, 5.0), ({"requests": 3}, None), ({"arrivals": "trace"}, None)],
)
def test_arrivals_that_nothing_else_ends_end_after_a_while(told: dict[str, Any], duration_s: float | None) -> None:
    assert workload_arguments({**OPTIONS, **told}, unless_told_s=60.0)["duration_s"] == duration_s


def test_a_mix_is_weights_by_category() -> None:
    assert workload_arguments({**OPTIONS, "mix": "1=3,6=0.5"})["mix"] == {1: 3.0, 6: 0.5}
