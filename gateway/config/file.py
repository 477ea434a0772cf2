"""Load a configuration file and report each mistake with its line, key and reason."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from gateway.config.keys_file import keys_path, read_keys
from gateway.config.mistakes import ConfigError, Mistake, key_path, line_of, merged, mistake_of
from gateway.config.schema import GatewayConfig, parse

MAX_FILE_BYTES = 16 << 20
"""Largest configuration file. The parser takes about a second for each MiB. Convention; a key takes 150 bytes."""

ENVIRONMENT = {
    "ANTARES_HOST": "server.host",
    "ANTARES_PORT": "server.port",
    "ANTARES_PREDICTOR_URL": "predictor.url",
    "ANTARES_SHARD_COUNT": "shard.count",
    "ANTARES_SHARD_INDEX": "shard.index",
}
"""Environment variable to the dotted key that it overrides. Containers use them."""


def load(
    path: Path,
    env: Mapping[str, str] = os.environ,
    overrides: Mapping[str, Any] | None = None,
    keys: Sequence[Any] | None = None,
) -> GatewayConfig:
    """Return the validated configuration in the file at ``path``.

    ``overrides`` maps dotted keys (``server.port``) to values. They take precedence over the variables of `ENVIRONMENT`
    in ``env``, and those over the file. Deprecated option names issue a FutureWarning. ``keys``: the entries of the
    keys file, which is read if they are None and the configuration names one.

    Raises:
        ConfigError: the file or its keys file is unreadable, malformed or invalid.
    """
    text = _text(path)
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
    named = document.get("keys_file")
    if named is not None and not isinstance(named, str):
        raise ConfigError(path, [Mistake(line_of(root, ["keys_file"]), "keys_file", "must be the path of a file")])
    if named:
        entries = read_keys(keys_path(named, path)) if keys is None else keys
        document["keys_file"] = {"path": named, "keys": entries}
    try:
        return parse(document)
    except ValidationError as invalid:
        mistakes = merged([mistake_of(error, root) for error in invalid.errors()])
        for key in from_env.keys() - (overrides or {}).keys():
            mistakes = [
                replace(m, reason=f"{m.reason} (from {from_env[key]})") if m.key == key else m for m in mistakes
            ]
        raise _placed(path, mistakes, named) from invalid


@contextlib.contextmanager
def recorded_deprecations() -> Iterator[list[str]]:
    """Collect the text of each FutureWarning once. Other warnings are shown as usual."""
    texts: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", FutureWarning)
        yield texts
    for warning in caught:
        text = str(warning.message)
        if not issubclass(warning.category, FutureWarning):
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
        elif text not in texts:
            texts.append(text)


def located(path: Path | None, mistakes: Sequence[tuple[str, str]], keys_file: str | None) -> ConfigError:
    """Return the error for ``mistakes`` (dotted key, reason) that a valid file at ``path`` has in this process.

    ``keys_file``: the keys file that it names.
    """
    root = None if path is None else _composed(path)
    found = [Mistake(line_of(root, key_path(key)), key, reason) for key, reason in mistakes]
    return _placed(path, found, keys_file)


def _placed(path: Path | None, mistakes: Sequence[Mistake], keys_file: str | None) -> ConfigError:
    """Return the error for ``mistakes`` of the file at ``path``; if all are in its keys file, that file's error."""
    prefix = "keys_file."
    if keys_file is None or not all(m.key.startswith(f"{prefix}keys") for m in mistakes):
        return ConfigError(path or Path("the configuration"), mistakes)
    file = keys_path(keys_file, path)
    root = _composed(file)
    keys = [m.key.removeprefix(prefix) for m in mistakes]
    return ConfigError(
        file, [Mistake(line_of(root, key_path(k)), k, m.reason) for k, m in zip(keys, mistakes, strict=True)]
    )


def _text(path: Path) -> str:
    """Return the content of the file. Raises `ConfigError` if it is unreadable, or larger than `MAX_FILE_BYTES`."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
        if len(content) > MAX_FILE_BYTES:
            raise ConfigError(path, [Mistake(1, "", f"is larger than {MAX_FILE_BYTES >> 20} MiB")])
        return content.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(path, [Mistake(1, "", f"cannot be read: {reason}")]) from error


def _composed(path: Path) -> yaml.Node | None:
    with contextlib.suppress(OSError, ValueError, RecursionError, yaml.YAMLError):
        return yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    return None


def _override(document: dict[str, Any], values: Mapping[str, Any]) -> None:
    """Set dotted keys in ``document``. A section of the wrong type is left to the validation."""
    for dotted, value in values.items():
        *sections, key = dotted.split(".")
        node: Any = document
        for section in sections:
            node = node.setdefault(section, {}) if isinstance(node, dict) else None
        if isinstance(node, dict):
            node[key] = value


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
