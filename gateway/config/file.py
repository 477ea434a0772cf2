"""Load a configuration file and report each mistake with its line, key and reason."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from gateway.config.schema import GatewayConfig, parse


@dataclass(frozen=True, slots=True)
class Mistake:
    """One invalid value or key: its line (1-based), its path (``engines[0].model``) and the reason."""

    line: int
    key: str
    reason: str

    def __str__(self) -> str:
        where = f"{self.key}: " if self.key else ""
        return f"line {self.line}: {where}{self.reason}"


class ConfigError(Exception):
    """The file is invalid; ``mistakes`` lists all mistakes, not only the first one."""

    def __init__(self, path: Path, mistakes: Sequence[Mistake]) -> None:
        self.path, self.mistakes = path, list(mistakes)
        super().__init__("\n".join(f"{path}: {mistake}" for mistake in mistakes))


ENVIRONMENT = {
    "ANTARES_HOST": "server.host",
    "ANTARES_PORT": "server.port",
    "ANTARES_PREDICTOR_URL": "predictor.url",
}
"""Environment variable to the dotted key that it overrides. Containers use them."""


def load(path: Path, env: Mapping[str, str] = os.environ, overrides: Mapping[str, Any] | None = None) -> GatewayConfig:
    """Return the validated configuration in the file at ``path``.

    ``overrides`` maps dotted keys (``server.port``) to values. They take precedence over the variables of `ENVIRONMENT`
    in ``env``, and those over the file. Deprecated option names issue a FutureWarning.

    Raises:
        ConfigError: the file is unreadable, not YAML, or invalid.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(path, [Mistake(1, "", f"cannot be read: {error}")]) from error
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        document = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(path, [Mistake(line, "", f"not YAML: {error.problem}")]) from error
    except (yaml.YAMLError, ValueError) as error:
        # Control characters raise YAMLError; values such as 2024-99-99 parse as a date and raise ValueError.
        raise ConfigError(path, [Mistake(1, "", f"not YAML: {error}")]) from error
    except RecursionError as error:
        raise ConfigError(path, [Mistake(1, "", "nesting is too deep")]) from error
    if not isinstance(document, dict):
        raise ConfigError(
            path, [Mistake(1, "", "the file must be a mapping with keys such as `engines:` and `classes:`")]
        )
    duplicate = _duplicate_key(root, set())
    if duplicate:
        raise ConfigError(path, [duplicate])
    from_env = {key: variable for variable, key in ENVIRONMENT.items() if env.get(variable)}
    _override(document, {**{key: env[variable] for key, variable in from_env.items()}, **(overrides or {})})
    try:
        return parse(document)
    except ValidationError as invalid:
        mistakes = _merged([_mistake(error, root) for error in invalid.errors()])
        for key in from_env.keys() - (overrides or {}).keys():
            mistakes = [
                replace(m, reason=f"{m.reason} (from {from_env[key]})") if m.key == key else m for m in mistakes
            ]
        raise ConfigError(path, mistakes) from invalid


def located(path: Path | None, mistakes: Sequence[tuple[str, str]]) -> ConfigError:
    """Return the error for ``mistakes`` (dotted key, reason) that a valid file at ``path`` has in this process."""
    root = None
    if path is not None:
        with contextlib.suppress(OSError, ValueError, yaml.YAMLError):
            root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    found = [Mistake(_line(root, _path(key)), key, reason) for key, reason in mistakes]
    return ConfigError(path or Path("the configuration"), found)


def _path(dotted: str) -> list[str | int]:
    """Return the parts of a key such as ``engines[0].model``."""
    parts = dotted.replace("[", ".").replace("]", "").split(".") if dotted else []
    return [int(part) if part.isdigit() else part for part in parts]


def _override(document: dict[str, Any], values: Mapping[str, Any]) -> None:
    """Set dotted keys in ``document``. A section of the wrong type is left to the validation."""
    for dotted, value in values.items():
        *sections, key = dotted.split(".")
        node: Any = document
        for section in sections:
            node = node.setdefault(section, {}) if isinstance(node, dict) else None
        if isinstance(node, dict):
            node[key] = value


def _mistake(error: Any, root: yaml.Node | None) -> Mistake:
    """Convert one error of pydantic."""
    path = list(error["loc"])
    if path[0:1] == ["engines"] and len(path) > 2:
        # pydantic inserts the engine's kind into the path, but the file has no such key.
        del path[2]
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "union_tag_not_found":
        path, message = [*path, "kind"], "is missing; choose one of vllm, http, simulated"
    elif error["type"] == "extra_forbidden":
        message = "unknown key"
    elif error["type"] == "missing":
        message = "is missing"
    elif not path and ": " in message:
        # Validators of the whole file start their message with the key.
        named, message = message.split(": ", 1)
        path = _path(named)
    elif path[-1:] and path[-1] in _UNION_MEMBERS:
        # pydantic reports one error per member of a union and appends the member's type to the path.
        path.pop()
    return Mistake(_line(root, path), _dotted(path), message)


_UNION_MEMBERS = frozenset(
    ("bool", "int", "float", "str", "list[str]", "constrained-str", "list[constrained-str]", "[key]")
)
"""Last parts of an error's path that pydantic adds and the file does not have."""


def _merged(mistakes: Sequence[Mistake]) -> list[Mistake]:
    """Join the reasons of mistakes at the same line and key."""
    merged: dict[tuple[int, str], Mistake] = {}
    for mistake in mistakes:
        position = (mistake.line, mistake.key)
        if position in merged:
            alternative = mistake.reason.removeprefix("Input should be ")
            merged[position] = replace(merged[position], reason=f"{merged[position].reason} or {alternative}")
        else:
            merged[position] = mistake
    return list(merged.values())


def _dotted(path: Sequence[str | int]) -> str:
    return "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in path).lstrip(".")


def _line(node: yaml.Node | None, path: Sequence[str | int]) -> int:
    """Return the line (1-based) of the deepest part of ``path`` that exists in the file."""
    if node is None:
        return 1
    line = node.start_mark.line
    for part in path:
        if isinstance(node, yaml.MappingNode):
            found = next(((k, v) for k, v in node.value if k.value == str(part)), None)
            if found is None:
                break
            line, node = found[0].start_mark.line, found[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line
        else:
            break
    return line + 1


def _duplicate_key(node: yaml.Node | None, visited: set[int]) -> Mistake | None:
    """Return a mistake for the first duplicate key. YAML itself lets the later key replace the earlier one silently."""
    # NOTE: an alias can refer to a node that contains it, so visit each node once.
    if id(node) in visited:
        return None
    visited.add(id(node))
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if key.value in seen:
                return Mistake(key.start_mark.line + 1, str(key.value), "duplicate key")
            seen.add(key.value)
            inner = _duplicate_key(value, visited)
            if inner:
                return inner
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            inner = _duplicate_key(value, visited)
            if inner:
                return inner
    return None
