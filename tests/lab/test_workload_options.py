"""Workload options of the measuring commands and their translation to `make_workload`."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from lab.bench.cli import bench
from lab.simulate.cli import simulate
from lab.workload import make_workload
from lab.workload_options import workload_arguments, workload_name

OPTIONS: dict[str, Any] = {
    "requests": None, "duration": None, "arrivals": "poisson", "burstiness": 1.0, "trace": None, "speed": 1.0,
    "window": None, "slo_table": "llama-3.1-8b", "slo_scale": 1.0, "mix": None, "max_prompt": None, "max_output": None,
    "rate_scale": 1.0, "trace_unit": None, "trace_block_tokens": None, "trace_model": None,
}  # fmt: skip


@pytest.mark.parametrize("command", [bench, simulate])
def test_command_options_cover_workload_arguments(command: Any) -> None:
    options = {name: parameter.default for name, parameter in inspect.signature(command).parameters.items()}
    assert {name: options[name] for name in OPTIONS} == OPTIONS
    arguments = workload_arguments(options)
    assert arguments.keys() | {"name", "qps", "seed"} == inspect.signature(make_workload).parameters.keys()


def test_burstiness_selects_gamma_arrivals() -> None:
    assert workload_arguments(OPTIONS)["arrivals"] == "poisson"
    assert workload_arguments({**OPTIONS, "burstiness": 3.0})["arrivals"] == "gamma"
    assert workload_arguments({**OPTIONS, "burstiness": 3.0, "arrivals": "trace"})["arrivals"] == "trace"


@pytest.mark.parametrize(
    ("options", "duration_s"),
    [({}, 60.0), ({"duration": 5.0}, 5.0), ({"requests": 3}, None), ({"arrivals": "trace"}, None)],
)
def test_default_duration_applies_to_unlimited_arrivals(options: dict[str, Any], duration_s: float | None) -> None:
    assert workload_arguments({**OPTIONS, **options}, default_duration_s=60.0)["duration_s"] == duration_s


def test_mix_is_parsed_to_weights_by_category() -> None:
    assert workload_arguments({**OPTIONS, "mix": "1=3,6=0.5"})["mix"] == {1: 3.0, 6: 0.5}


def test_trace_file_is_the_workload_and_its_arrivals() -> None:
    options = {**OPTIONS, "workload": "sharegpt", "trace": "traffic.jsonl"}
    arguments = workload_arguments(options, default_duration_s=60.0)
    assert workload_name(options) == "traffic.jsonl"
    assert (arguments["arrivals"], arguments["trace"], arguments["duration_s"]) == ("trace", None, None)
    assert workload_name({**options, "trace": "azure-code"}) == "sharegpt"
