"""Compares vLLM in the gateway's process with plain `vllm serve`, with the same model and flags.

    python -m benchmarks.overhead.in_process --json > docs/results/in_process.json
    python -m benchmarks.overhead.in_process --page docs/results/in_process.json

Both servers run side by side and take turns, load by load, and each round starts them afresh. One is idle while the
other is measured. The engine, the server and the load client share the machine's cores, so what a server adds takes
time from its engine. A round takes about four minutes.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
import uvloop
import yaml

from benchmarks.command import AsJson, PageOf, print_results, write_page
from benchmarks.live.dummy_model import write_dummy_model
from benchmarks.markdown import table, wrapped
from benchmarks.overhead.peers.client import API_KEY
from benchmarks.overhead.peers.measure import Shape, measure
from benchmarks.overhead.peers.report import cell, failures
from benchmarks.overhead.peers.servers import TREE, Server, antares_config
from benchmarks.overhead.peers.upstream import MODEL

PLAIN, OURS = "vllm serve", "antares"
TOKENS = 32
FLAGS: dict[str, Any] = {
    "load-format": "dummy",
    "max-model-len": 2048,
    "max-num-seqs": 64,
    "max-num-batched-tokens": 512,
    "enforce-eager": True,
    "dtype": "float32",
}
ENV = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "PYTHONPATH": str(TREE)}

LOW, HIGH = "1 connection", "32 connections"
SHAPES = (
    # Several tokens of random weights may make one character, so that a token has no event of its own.
    # In short turns, because a machine whose speed changes would favour one server.
    *(Shape(LOW, 1, TOKENS, stream=True, requests=6, seconds=60.0, limit_s=60.0, events=1) for _ in range(6)),
    Shape(HIGH, 32, TOKENS, stream=True, requests=4, seconds=90.0, limit_s=90.0, events=1),
)
WARM_UPS = (Shape("warm-up", 8, TOKENS, stream=True, requests=4, seconds=20.0, limit_s=60.0, events=1),)

# vLLM's package for CPUs has a name of its own, which vLLM's command does not look for.
_VLLM_CLI = """
import importlib.metadata as metadata
version = metadata.version
metadata.version = lambda name: version("vllm-cpu") + "+cpu" if name == "vllm" else version(name)
from vllm.entrypoints.cli.main import main
main()
"""


def plain_command(port: int, _upstream: str, folder: Path) -> list[str]:
    """Return the command of `vllm serve`."""
    model = str(write_dummy_model(folder / "plain"))
    command = [sys.executable, "-c", _VLLM_CLI, "serve", model, "--served-model-name", MODEL]
    for name, value in FLAGS.items():
        command += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return [*command, "--host", "127.0.0.1", "--port", str(port), "--api-key", API_KEY]


def our_command(port: int, upstream: str, folder: Path) -> list[str]:
    """Return the command of the gateway with the engine in its process, the predictor and the default policy."""
    model = str(write_dummy_model(folder / "ours"))
    engine = {"kind": "vllm", "name": "local", "model": model, "served_model_name": MODEL, "flags": FLAGS}
    config = antares_config(port, upstream) | {"engines": [engine]}
    file = folder / f"antares-{port}.yaml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    return [sys.executable, "-c", "from gateway.cli import main; main()", "serve", "--config", str(file)]


SERVERS = (Server(PLAIN, command=plain_command, env=ENV), Server(OURS, command=our_command, env=ENV))


def ratios(runs: Sequence[dict[str, Any]], shape: str, key: str) -> list[float]:
    """Return ours over plain for ``key``, one for each pair of turns at ``shape``."""
    plain, ours = ([run[key] for run in runs if (run["shape"], run["server"]) == (shape, at)] for at in (PLAIN, OURS))
    return [mine / other for mine, other in zip(ours, plain, strict=True) if mine is not None and other]


_COLUMNS = (
    ("requests/s", "per_s", "{:.2f}"),
    ("TTFT p50, ms", "ttft_p50_ms", "{:.1f}"),
    ("TTFT p99, ms", "ttft_p99_ms", "{:.1f}"),
    ("ITL p50, ms", "itl_p50_ms", "{:.1f}"),
    ("ITL p99, ms", "itl_p99_ms", "{:.1f}"),
)


def rows(runs: Sequence[dict[str, Any]], shape: str) -> list[list[str]]:
    """Return a row for each server, and one of the ratios."""
    found = []
    for server in (PLAIN, OURS):
        those = [run for run in runs if run["shape"] == shape and run["server"] == server]
        numbers = {key: [run[key] for run in those if run[key] is not None] for _, key, _ in _COLUMNS}
        found.append([server, *(cell(numbers[key], number.format) for _, key, number in _COLUMNS)])
    found.append(["ratio", *(cell(ratios(runs, shape, key), "{:.3f}".format) for _, key, _ in _COLUMNS)])
    return found


def page(found: dict[str, Any]) -> str:
    """Return the page of a measurement."""
    flags = ", ".join(name if value is True else f"{name} {value}" for name, value in FLAGS.items())
    parts = [
        "# vLLM in the gateway's process against `vllm serve`",
        f"""**CPU.** A small Llama with random weights on {found["cpus"]} cores, which engine, server and load client
share; streamed answers of {TOKENS} tokens. Its steps are shorter than those of a large model on a GPU, so the overhead
weighs more. Medians over the turns, in brackets their range. The servers take turns, and each round
({found["rounds"]}) starts them afresh.""",
        f"""- *antares*: the engine runs in the gateway's process. API key, SLO headers, the default policy, the
predictor and metrics are on.
- *ratio*: antares divided by `vllm serve`, in two turns that follow each other and have the same prompts.
- Both have the flags {flags}.""",
        f"""```
python -m benchmarks.overhead.in_process --rounds {found["rounds"]} --json > docs/results/in_process.json
python -m benchmarks.overhead.in_process --page docs/results/in_process.json
```""",
    ]
    heads = ["", *(head for head, _, _ in _COLUMNS)]
    for shape in (LOW, HIGH):
        parts += [f"## {shape}", table(heads, rows(found["runs"], shape))]
    parts += [f"- {line}" for line in failures(found["runs"])]
    return "\n\n".join(wrapped(part) for part in parts) + "\n"


def main(
    rounds: Annotated[int, typer.Option(min=1, help="Rounds in which the servers take turns.")] = 3,
    as_json: AsJson = False,
    page_of: PageOf = None,
) -> None:
    """Measure vLLM behind and without the gateway, in rounds, and report medians, ranges and ratios."""
    if page_of is not None:
        write_page(page_of, page)
        return
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runs = runner.run(measure(SERVERS, rounds, SHAPES, WARM_UPS))
    print_results({"rounds": rounds, "cpus": os.cpu_count(), "runs": runs}, as_json, page)


if __name__ == "__main__":
    typer.run(main)
