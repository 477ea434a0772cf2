"""What the Helm chart starts, run here: drains, the queries that scale, and the scheduler class."""

from __future__ import annotations

import ast
import asyncio
import json
import signal
import subprocess
import sys
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import yaml

from tests.fixtures import prometheus
from tests.fixtures.helm_chart import (
    NAMESPACE,
    VALUES_FILES,
    Manifest,
    configuration,
    container_of,
    of_kind,
    one,
    pod_of,
    references,
    render,
    rendered,
    values,
)
from tests.fixtures.live_gateway import CHAT, chat
from tests.fixtures.live_server import HANG_S
from tests.fixtures.ports import free_port
from tests.fixtures.served_process import served

ROOT = Path(__file__).parents[1]


@dataclass
class Pod:
    """A container of the chart that runs as a process, and its ``http`` client."""

    deployment: Manifest
    process: Process
    http: httpx.AsyncClient

    async def stop(self) -> int:
        """Stop it as Kubernetes does: the preStop hook, then SIGTERM. Returns the exit code.

        Raises TimeoutError where Kubernetes would send SIGKILL.
        """
        (hook,) = references(container_of(self.deployment)["lifecycle"]["preStop"], "command")
        async with asyncio.timeout(pod_of(self.deployment)["terminationGracePeriodSeconds"]):
            assert await (await asyncio.create_subprocess_exec(*hook)).wait() == 0
            self.process.send_signal(signal.SIGTERM)
            assert self.process.stderr is not None
            await self.process.stderr.read()
            return await self.process.wait()


@asynccontextmanager
async def started(folder: Path, made: list[Manifest], name: str, port: int = 0, engines: int = 0) -> AsyncIterator[Pod]:
    """Run the container of a Deployment with the chart's configuration, on ``port`` of 127.0.0.1.

    ``engines``: the port of the engines, which have the name `localhost` here.
    """
    deployment = one(made, "Deployment", name)
    command, option, file = container_of(deployment)["args"]
    assert (command, option) == ("serve", "--config")
    config = configuration(made, name, Path(file).name)
    config["server"] |= {"host": "127.0.0.1", "port": port}
    for engine in config["engines"]:
        if engine["kind"] == "http":
            assert engine["base_url"] == f"http://prod-{engine['name']}:8000"
            engine["base_url"] = f"http://localhost:{engines}"
    (folder / name).mkdir()
    async with served(folder / name, yaml.safe_dump(config)) as (process, http):
        yield Pod(deployment, process, http)


def small_chart(**more: object) -> list[Manifest]:
    """Return the manifests of `values-dev.yaml` with one short wait before an engine stops, and ``more``."""
    dev = values("values-dev.yaml")
    engines = {**dev["engineDefaults"], "settleSeconds": 2}
    return render({**dev, "predictor": {"enabled": False}, "engineDefaults": engines, **more})


@asynccontextmanager
async def running(folder: Path, made: list[Manifest]) -> AsyncIterator[tuple[Pod, Pod]]:
    """Run a gateway and a simulated engine of the chart. Yields both."""
    port = free_port()
    async with (
        started(folder, made, "simulated", port) as engine,
        started(folder, made, "gateway", engines=port) as gateway,
    ):
        yield gateway, engine


async def stream_of(gateway: Pod, events: asyncio.Queue[str]) -> None:
    """Put the events of a stream of about 6 s into ``events``."""
    body = {**chat(stream=True, max_tokens=400, ignore_eos=True), "model": "simulated"}
    async with gateway.http.stream("POST", CHAT, json=body, headers={"x-slo-class": "batch"}) as answer:
        assert answer.status_code == 200
        async for line in answer.aiter_lines():
            if line:
                await events.put(line)


@pytest.mark.process
@pytest.mark.parametrize("stops", ["gateway", "engine"])
async def test_stream_ends_normally_when_its_pod_is_deleted(tmp_path: Path, stops: str) -> None:
    async with running(tmp_path, small_chart()) as (gateway, engine):
        events: asyncio.Queue[str] = asyncio.Queue()
        stream = asyncio.create_task(stream_of(gateway, events))
        for _ in range(20):
            await asyncio.wait_for(events.get(), HANG_S)
        code = await (gateway if stops == "gateway" else engine).stop()
        await stream
        left = [events.get_nowait() for _ in range(events.qsize())]
        assert left[-1] == "data: [DONE]"
        assert json.loads(left[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        assert len(left) > 300
        assert code == 0


def scrape_config(folder: Path, made: list[Manifest], gateway: Pod) -> dict[str, object]:
    """Return a configuration of Prometheus as its operator makes one from the chart's ServiceMonitor and rules."""
    groups = [rule["spec"] for rule in of_kind(made, "PrometheusRule")]
    (folder / "rules.yml").write_text(yaml.safe_dump(groups[0]))
    (endpoint,) = one(made, "ServiceMonitor", "gateway")["spec"]["endpoints"]
    # The operator sets the job to the Service's name, and the namespace.
    target = {"targets": [gateway.http.base_url.netloc.decode()], "labels": {"namespace": NAMESPACE}}
    job = one(made, "Service", "gateway")["metadata"]["name"]
    return {
        "global": {"scrape_interval": "500ms", "scrape_timeout": "500ms", "evaluation_interval": "500ms"},
        "rule_files": [str(folder / "rules.yml")],
        "scrape_configs": [{"job_name": job, "metrics_path": endpoint["path"], "static_configs": [target]}],
    }


@pytest.mark.process
@pytest.mark.parametrize("scaled_by", ["rate", "wanted"])
async def test_queries_of_the_autoscalers_return_the_signal_of_a_running_gateway(
    tmp_path: Path, scaled_by: str
) -> None:
    prometheus.tool("prometheus")
    pool = {"name": "simulated", "model": "simulated", "autoscaling": {"enabled": True}}
    gateway_values = {**values("values-dev.yaml")["gateway"], "config": {"wanted_replicas": {"interval_s": 5}}}
    more = {"engines": [pool], "monitoring": {"enabled": True}, "gateway": gateway_values}
    keda = one(small_chart(**more, autoscaling={"kind": "keda", "signal": scaled_by}), "ScaledObject", "simulated")
    made = small_chart(**more, autoscaling={"signal": scaled_by})
    (metric,) = references(one(made, "HorizontalPodAutoscaler", "simulated"), "metric")
    labels = ",".join(f'{name}="{value}"' for name, value in metric["selector"]["matchLabels"].items())
    queries = {"hpa": f"{metric['name']}{{{labels}}}", **{"keda": next(references(keda, "query"))}}

    async with running(tmp_path, made) as (gateway, _):
        config = scrape_config(tmp_path, made, gateway)
        async with prometheus.started(tmp_path, {}, config=config) as server:
            await server.wait_up(1)
            await server.wait_evaluated()
            if scaled_by == "rate":
                assert [float(s["value"][1]) for s in await server.query(queries["keda"])] == [0]
            body = {**chat(max_tokens=2, ignore_eos=True), "model": "simulated"}
            found: dict[str, float] = {}
            async with asyncio.timeout(HANG_S):
                while len(found) < 2:
                    assert (await gateway.http.post(CHAT, json=body)).status_code == 200
                    for name, query in queries.items():
                        for series in await server.query(query):
                            if float(series["value"][1]) > 0:
                                found[name] = float(series["value"][1])
        assert set(found) == {"hpa", "keda"}
        if scaled_by == "wanted":
            assert set(found.values()) == {1}


# --- the scheduler class inside vLLM's image --------------------------------------------------------------------------


def imported(nodes: Iterable[ast.AST]) -> Iterator[str]:
    """Yield the names that a module imports when it is loaded."""
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif (
            not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            and "TYPE_CHECKING" not in ast.unparse(node)[:20]
        ):
            yield from imported(ast.iter_child_nodes(node))


def _is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def loaded_with(module: str, seen: set[str]) -> set[str]:
    """Return the packages of others that ``module`` of engine_adapter loads, itself or through modules of ours."""
    path = ROOT / Path(*module.split(".")).with_suffix(".py")
    if module in seen or not path.exists():
        return set()
    seen.add(module)
    names = set(imported(ast.parse(path.read_text(encoding="utf-8")).body))
    ours = {name for name in names if name.startswith("engine_adapter.")}
    others = {name.split(".")[0] for name in names - ours} - {"engine_adapter"}
    return others.union(*(loaded_with(name, seen) for name in ours))


def test_scheduler_class_needs_only_what_vllm_installs() -> None:
    others = loaded_with("engine_adapter.vllm_scheduler", set()) - sys.stdlib_module_names
    assert others == {"vllm", "numpy", "msgspec"}


def init_command(folder: Path) -> list[str]:
    """Return the command of the init container, which copies to ``folder``."""
    (container,) = pod_of(one(rendered("values.yaml"), "Deployment", "main"))["initContainers"]
    python, *arguments, target = container["command"]
    assert (python, target) == ("python", "/opt/antares")
    return [sys.executable, *arguments, str(folder)]


@pytest.mark.process
def test_init_container_copies_the_scheduler_class(tmp_path: Path) -> None:
    # Twice, because it also runs when the pod's sandbox was restarted.
    for _ in range(2):
        subprocess.run(init_command(tmp_path), cwd=ROOT, check=True, timeout=60)
    scheduler = next(
        a for a in container_of(one(rendered("values.yaml"), "Deployment", "main"))["args"] if "scheduler" in a
    )
    module = scheduler.partition("=")[2].rpartition(".")[0]
    assert (tmp_path / Path(*module.split("."))).with_suffix(".py").exists()


@pytest.mark.engine
@pytest.mark.timeout(600)
def test_vllm_accepts_the_arguments_and_loads_the_scheduler_class(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    subprocess.run(init_command(tmp_path), cwd=ROOT, check=True, timeout=60)
    deployments = [m for file in VALUES_FILES for m in of_kind(rendered(file), "Deployment")]
    lists = [container_of(m)["args"] for m in deployments if "initContainers" in pod_of(m)]
    assert len(lists) == 4
    script = f"""
import importlib, sys
sys.modules["orjson"] = sys.modules["httpx"] = None
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser
for arguments in {lists!r}:
    parsed = make_arg_parser(FlexibleArgumentParser()).parse_args(arguments)
    assert parsed.shutdown_timeout > 0, parsed
    module, _, name = parsed.scheduler_cls.rpartition(".")
    loaded = importlib.import_module(module)
    assert loaded.__file__.startswith({str(tmp_path)!r}), loaded
    print(getattr(loaded, name).__name__)
"""
    answer = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(tmp_path)},
        capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
    assert answer.stdout.split() == ["SloScheduler"] * 4, answer.stderr[-3000:]
