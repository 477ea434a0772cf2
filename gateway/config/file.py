"""Reading a configuration file, and saying where in it a mistake is: line, key, reason."""

from __future__ import annotations

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
    """One thing to fix: its line (1-based), the key's path (``engines[0].model``), and why."""

    line: int
    key: str
    reason: str

    def __str__(self) -> str:
        where = f"{self.key}: " if self.key else ""
        return f"line {self.line}: {where}{self.reason}"


class ConfigError(Exception):
    """The file cannot be used; ``mistakes`` says why, all of them at once."""

    def __init__(self, path: Path, mistakes: Sequence[Mistake]) -> None:
        self.path, self.mistakes = path, list(mistakes)
        super().__init__("\n".join(f"{path}: {mistake}" for mistake in mistakes))


ENVIRONMENT = {
    "ANTARES_HOST": "server.host",
    "ANTARES_PORT": "server.port",
    "ANTARES_PREDICTOR_URL": "predictor.url",
}
"""Environment variables that override the file, for containers."""


def load(path: Path, env: Mapping[str, str] = os.environ, overrides: Mapping[str, Any] | None = None) -> GatewayConfig:
    """Read, override, validate; raises `ConfigError`.

    ``overrides`` maps dotted keys (``server.port``) to values; they win over `ENVIRONMENT`, which wins over the file.
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
        # A control character, or a value such as 2024-99-99 that looks like a date and is none.
        raise ConfigError(path, [Mistake(1, "", f"not YAML: {error}")]) from error
    except RecursionError as error:
        raise ConfigError(path, [Mistake(1, "", "is nested too deeply")]) from error
    if not isinstance(document, dict):
        raise ConfigError(path, [Mistake(1, "", "must hold keys such as `engines:` and `classes:`")])
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


def _override(document: dict[str, Any], values: Mapping[str, Any]) -> None:
    for dotted, value in values.items():
        *sections, key = dotted.split(".")
        part: Any = document
        for section in sections:
            part = part.setdefault(section, {}) if isinstance(part, dict) else None
        if isinstance(part, dict):
            part[key] = value


def _mistake(error: Any, root: yaml.Node | None) -> Mistake:
    path = list(error["loc"])
    if path[0:1] == ["engines"] and len(path) > 2:
        # pydantic puts the chosen kind of engine into the path; the file has no such key.
        del path[2]
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "union_tag_not_found":
        path, message = [*path, "kind"], "is missing; choose one of vllm, http, simulated"
    elif error["type"] == "extra_forbidden":
        message = "is not a key here"
    elif error["type"] == "missing":
        message = "is missing"
    elif not path and ": " in message:
        # A check over the whole file names its key itself.
        named, message = message.split(": ", 1)
        path = [int(p) if p.isdigit() else p for p in named.replace("[", ".").replace("]", "").split(".")]
    elif path[-1:] and path[-1] in _TYPES_AND_KEYS:
        # What did not fit any type of a union is told once for each, with the type in the path.
        path.pop()
    return Mistake(_line(root, path), _dotted(path), message)


_TYPES_AND_KEYS = frozenset(("bool", "int", "float", "str", "list[str]", "[key]"))


def _merged(mistakes: Sequence[Mistake]) -> list[Mistake]:
    """One mistake for each key."""
    merged: dict[tuple[int, str], Mistake] = {}
    for mistake in mistakes:
        place = (mistake.line, mistake.key)
        if place in merged:
            also = mistake.reason.removeprefix("Input should be ")
            merged[place] = replace(merged[place], reason=f"{merged[place].reason} or {also}")
        else:
            merged[place] = mistake
    return list(merged.values())


def _dotted(path: Sequence[str | int]) -> str:
    return "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in path).lstrip(".")


def _line(node: yaml.Node | None, path: Sequence[str | int]) -> int:
    """The line of the deepest part of ``path`` that the file has."""
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
    """YAML lets a later key silently replace an earlier one; in a configuration that is a mistake."""
    # An alias leads to a node that was seen before, or that we stand in.
    if id(node) in visited:
        return None
    visited.add(id(node))
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if key.value in seen:
                return Mistake(key.start_mark.line + 1, str(key.value), "stands here a second time")
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
