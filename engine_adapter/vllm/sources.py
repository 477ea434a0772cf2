"""Reads classes and functions from vLLM's source without importing it, so that any version can be examined.

A *member* of a class is what its body or one of its methods assigns, in it or in a base class of vLLM's. A member of a
function is an attribute that the function assigns to one of its parameters.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

Read = Callable[[str], str | None]
"""Returns the source of a module, given its file in the package ("v1/request.py"); None if there is none."""

Members = Callable[[str], dict[str, str] | None]
"""Returns the members of a class or function (`Sources.members`); None if it does not exist."""

_MAX_REEXPORTS = 8
"""Bounds how many imports are followed to a definition, in case they form a cycle."""

_Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef | ast.expr


def installed() -> Sources:
    """Return the source of the vLLM that is installed, which is not imported."""
    spec = importlib.util.find_spec("vllm")
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []

    def read(file: str) -> str | None:
        for folder in folders:
            with contextlib.suppress(OSError):
                return (Path(folder) / file).read_text(encoding="utf-8")
        return None

    return Sources(read)


@dataclass
class Sources:
    """The source of one vLLM version."""

    read: Read
    _modules: dict[str, tuple[str, ast.Module] | None] = field(default_factory=dict)

    def members(self, path: str) -> dict[str, str] | None:
        """Return the members of the class or function at ``path`` (dotted), with their signatures; None without it.

        The member "" is the signature of the class or function itself. A member that is no function has none: "".
        """
        found = self._find(path)
        if found is None:
            return None
        package, node = found
        if isinstance(node, ast.ClassDef):
            members = {"": ""}
            for each in self._lineage(package, node):
                members = _class_members(each) | members
            fields = ", ".join(f"{name}=..." for name, signature in members.items() if name and not signature)
            members[""] = members.get("__init__") or f"(self, {fields})"
            return members
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            return {"": _signature(node), **dict.fromkeys(_assigned(node, {a.arg for a in node.args.args}), "")}
        return {"": ""}

    def _lineage(self, package: str, node: ast.ClassDef) -> Iterator[ast.ClassDef]:
        """Yield the class and those of its base classes that vLLM defines, from the class upwards."""
        yield node
        for base in node.bases:
            target = base.value if isinstance(base, ast.Subscript) else base
            found = self._find(f"{package}.{target.id}") if isinstance(target, ast.Name) else None
            if found is not None and isinstance(found[1], ast.ClassDef):
                yield from self._lineage(found[0], found[1])

    def _find(self, path: str) -> tuple[str, _Definition] | None:
        """Return the module that defines ``path``, and the definition. Imports are followed."""
        for _ in range(_MAX_REEXPORTS):
            module, _, name = path.rpartition(".")
            tree = self._module(module)
            if tree is None:
                return None
            for node in _statements(tree[1].body):
                if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.name == name:
                    return module, node
                if isinstance(node, ast.Assign | ast.AnnAssign) and node.value and name in _targets(node):
                    return module, node.value
            origin = _imported_from(tree[0], tree[1], name)
            if origin is None:
                return None
            path = origin
        return None

    def _module(self, name: str) -> tuple[str, ast.Module] | None:
        """Return the package of a module and its syntax tree."""
        if name not in self._modules:
            folder = "/".join(name.split(".")[1:])
            self._modules[name] = None
            for file, package in ((f"{folder}/__init__.py", name), (f"{folder}.py", name.rpartition(".")[0])):
                source = self.read(file.lstrip("/"))
                if source is not None:
                    self._modules[name] = (package, ast.parse(source))
                    break
        return self._modules[name]


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield the statements of a module, those under ``if`` and ``try`` too."""
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try):
            yield from _statements([*node.body, *node.orelse])


def _imported_from(package: str, tree: ast.Module, name: str) -> str | None:
    """Return the dotted path from which a module imports ``name``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            origin = ".".join([*parents[: len(parents) - node.level + 1], node.module or ""]) if node.level else None
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return f"{(origin or node.module or '').rstrip('.')}.{alias.name}"
    return None


def _class_members(node: ast.ClassDef) -> dict[str, str]:
    members: dict[str, str] = {}
    for each in node.body:
        if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef):
            is_property = any("property" in ast.unparse(decorator) for decorator in each.decorator_list)
            members[each.name] = "" if is_property else _signature(each)
            for name in _assigned(each, {"self"}):
                members.setdefault(name, "")
        elif isinstance(each, ast.Assign | ast.AnnAssign):
            members |= dict.fromkeys(_targets(each), "")
    return members


def _assigned(function: ast.AST, owners: set[str]) -> Iterator[str]:
    """Yield the attributes that a function assigns to the names ``owners``."""
    for node in ast.walk(function):
        match node:
            case ast.Attribute(value=ast.Name(id=owner), ctx=ast.Store()) if owner in owners:
                yield node.attr


def _targets(node: ast.Assign | ast.AnnAssign) -> list[str]:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return [each.id for target in targets for each in ast.walk(target) if isinstance(each, ast.Name)]


def _signature(function: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """Return the parameters, with "..." for every default."""
    arguments = function.args
    positional = [*arguments.posonlyargs, *arguments.args]
    required = len(positional) - len(arguments.defaults)
    parts = [each.arg + "=..." * (at >= required) for at, each in enumerate(positional)]
    if arguments.vararg:
        parts.append(f"*{arguments.vararg.arg}")
    elif arguments.kwonlyargs:
        parts.append("*")
    pairs = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    parts += [each.arg + "=..." * (default is not None) for each, default in pairs]
    if arguments.kwarg:
        parts.append(f"**{arguments.kwarg.arg}")
    return f"({', '.join(parts)})"
