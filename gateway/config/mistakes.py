"""Mistakes in configuration files: their line, key and reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import yaml

from engine_adapter.suggestion import did_you_mean
from gateway.config.schema import GatewayConfig
from gateway.config.section import URL_PATTERN, Section
from gateway.policies.registry import UnknownOption


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


def key_path(dotted: str) -> list[str | int]:
    """Return the parts of a key such as ``engines[0].model``."""
    parts = dotted.replace("[", ".").replace("]", "").split(".") if dotted else []
    return [int(part) if part.isdigit() else part for part in parts]


def mistake_of(error: Any, root: yaml.Node | None) -> Mistake:
    """Convert one error of pydantic."""
    path = list(error["loc"])
    if path[0:1] == ["engines"] and len(path) > 2:
        # pydantic inserts the engine's kind into the path, but the file has no such key.
        del path[2]
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "union_tag_not_found":
        path, message = [*path, "kind"], "is missing; choose one of vllm, http, simulated"
    elif error["type"] == "extra_forbidden":
        message = _unknown_key(error["loc"])
    elif error["type"] == "missing":
        message = "is missing"
    elif error["type"] == "string_pattern_mismatch" and error["ctx"]["pattern"] == URL_PATTERN:
        message = "must begin with http:// or https://"
    elif isinstance(error.get("ctx", {}).get("error"), UnknownOption):
        # pydantic knows only the section in which the validator found the option.
        path += ["options", error["ctx"]["error"].option]
    elif not path and ": " in message:
        # Validators of the whole file start their message with the key.
        named, message = message.split(": ", 1)
        path = key_path(named)
    elif path[-1:] and path[-1] in _UNION_MEMBERS:
        # pydantic reports one error per member of a union and appends the member's type to the path.
        path.pop()
    return Mistake(line_of(root, path), dotted_key(path), message)


_UNION_MEMBERS = frozenset(
    ("bool", "int", "float", "str", "list[str]", "constrained-str", "list[constrained-str]", "[key]")
)
"""Last parts of an error's path that pydantic adds and the file does not have."""


def _unknown_key(loc: Sequence[str | int]) -> str:
    """Return the reason for the unknown key at ``loc``: it names the most similar key of the section, or else all."""
    known = _keys_at(GatewayConfig, loc[:-1])
    return f"unknown key; {did_you_mean(str(loc[-1]), known, 'the keys here are', quote='`')}"


def _keys_at(kind: Any, loc: Sequence[str | int]) -> list[str]:
    """Return the keys of the section at ``loc``, as pydantic reports it, inside a value of the type ``kind``."""
    if isinstance(kind, type) and issubclass(kind, Section):
        return _keys_at(kind.model_fields[str(loc[0])].annotation, loc[1:]) if loc else list(kind.model_fields)
    members = get_args(kind)
    if get_origin(kind) is Annotated:
        return _keys_at(members[0], loc)
    if get_origin(kind) in (list, dict):
        return _keys_at(members[-1], loc[1:])
    sections = [member for member in members if issubclass(member, Section)]
    if len(sections) > 1:
        # The next part is the engine's kind.
        return _keys_at(next(s for s in sections if get_args(s.model_fields["kind"].annotation)[0] == loc[0]), loc[1:])
    return _keys_at(sections[0], loc)


def merged(mistakes: Sequence[Mistake]) -> list[Mistake]:
    """Join the reasons of mistakes at the same line and key."""
    by_place: dict[tuple[int, str], Mistake] = {}
    for mistake in mistakes:
        position = (mistake.line, mistake.key)
        if position in by_place:
            alternative = mistake.reason.removeprefix("Input should be ")
            by_place[position] = replace(by_place[position], reason=f"{by_place[position].reason} or {alternative}")
        else:
            by_place[position] = mistake
    return list(by_place.values())


def dotted_key(path: Sequence[str | int]) -> str:
    """Return ``path`` as it is written, such as ``engines[0].model``."""
    return "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in path).lstrip(".")


def line_of(node: yaml.Node | None, path: Sequence[str | int]) -> int:
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
