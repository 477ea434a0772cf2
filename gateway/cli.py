"""The `antares` command. Each command imports heavy modules only when it runs."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

LAZY_COMMANDS = {
    "predictor": ("predictor_service.cli", "Train, evaluate and serve the output-length predictor."),
    "simulate": ("lab.cli", "Simulate capacity and compare policies in virtual time, without a GPU."),
    "bench": ("lab.cli", "Measure an OpenAI-compatible server under a workload with SLOs."),
    "profile": ("lab.cli", "Create a step-time profile of an engine, or show one."),
}
"""Command to (module with a typer ``app``, help). The modules are named, since the gateway must not import them."""


class LazyGroup(TyperGroup):
    """A command group that imports the module of a `LAZY_COMMANDS` entry only when its command runs."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return all command names, lazy ones last."""
        return [*super().list_commands(ctx), *LAZY_COMMANDS]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return the command. A lazy command is a stub with name and help."""
        if cmd_name in LAZY_COMMANDS:
            return TyperCommand(cmd_name, help=LAZY_COMMANDS[cmd_name][1])
        return super().get_command(ctx, cmd_name)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Return the command to run, after importing it."""
        name, command, rest = super().resolve_command(ctx, args)
        module, _ = LAZY_COMMANDS.get(name or "", (None, ""))
        if module is None:
            return name, command, rest
        group: Any = typer.main.get_command(import_module(module).app)
        # `lab.cli` is a group with a command of this name; `predictor_service.cli` is the command itself.
        return name, group.commands.get(name, group), rest


app = typer.Typer(
    cls=LazyGroup,
    name="antares",
    help="Antares: an SLO-first serving gateway for vLLM.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
config_app = typer.Typer(help="Check configuration files and hash API keys.", no_args_is_help=True)
app.add_typer(config_app, name="config")

ConfigPath = Annotated[Path, typer.Option("--config", "-c", help="Configuration file (YAML); see configs/.")]


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        from gateway import __version__

        typer.echo(f"antares {__version__}")
        raise typer.Exit


@app.command()
def serve(
    config: ConfigPath,
    host: Annotated[str | None, typer.Option(help="Listen here instead of server.host.")] = None,
    port: Annotated[int | None, typer.Option(help="Listen on this port instead of server.port.")] = None,
    policy: Annotated[str | None, typer.Option(help="Use this policy with its default options.")] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.")] = None,
) -> None:
    """Start the gateway, its engines and the predictor process."""
    import asyncio

    overrides = _overrides(host=host, port=port, policy=policy, log_level=log_level)
    loaded, deprecations = _load(config, overrides)
    from gateway.config.file import load
    from gateway.observability import logs
    from gateway.serve import ServeError
    from gateway.serve import serve as run

    logs.configure(loaded.logging.level, loaded.logging.format)
    for deprecation in deprecations:
        logging.getLogger("antares.config").warning("%s: %s", config, deprecation)
    try:
        if sys.platform == "win32":
            asyncio.run(run(loaded))
        else:
            import uvloop

            uvloop.run(run(loaded, lambda: load(config, overrides=overrides)))
    except ServeError as error:
        typer.echo(f"antares: {error}", err=True)
        raise typer.Exit(1) from error
    except (KeyboardInterrupt, asyncio.CancelledError):
        raise typer.Exit(130) from None


@app.command()
def top(
    url: Annotated[str, typer.Option(help="URL of the gateway.")] = "http://127.0.0.1:8100",
    key_env: Annotated[
        str | None, typer.Option(help="Environment variable with the API key, if the gateway asks for one.")
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="Print one frame and exit.")] = False,
) -> None:
    """Show the state of a gateway in the terminal, as its dashboard does. Press q to leave."""
    import asyncio
    import os

    from rich.console import Console

    from gateway.top import TopError, run

    key = os.environ.get(key_env) if key_env else None
    if key_env and not key:
        typer.echo(f"antares: the environment variable {key_env} is not set", err=True)
        raise typer.Exit(2)
    try:
        asyncio.run(run(url.rstrip("/"), key, once, Console()))
    except TopError as error:
        typer.echo(f"antares: {error}", err=True)
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


@config_app.command("check")
def config_check(
    file: Annotated[Path, typer.Argument(help="The file to check.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
) -> None:
    """Validate FILE and report every mistake with its line, key and reason."""
    import orjson

    from gateway.config.file import ConfigError, load

    try:
        with _recorded_deprecations() as deprecations:
            cautions = load(file).cautions()
    except ConfigError as error:
        if as_json:
            found = [{"line": m.line, "key": m.key, "reason": m.reason} for m in error.mistakes]
            typer.echo(orjson.dumps({"ok": False, "mistakes": found}).decode())
        else:
            typer.echo(str(error), err=True)
        raise typer.Exit(1) from error
    for caution in [*deprecations, *cautions]:
        typer.echo(f"{file}: {caution}", err=True)
    typer.echo(orjson.dumps({"ok": True, "mistakes": []}).decode() if as_json else f"{file}: ok")


@config_app.command("hash-key")
def config_hash_key() -> None:
    """Read an API key from standard input and print its digest for `keys:`."""
    from gateway.api.auth import hash_key

    key = typer.prompt("API key", hide_input=True) if sys.stdin.isatty() else sys.stdin.readline().strip()
    if len(key) < 16:
        typer.echo("antares: an API key needs at least 16 characters (try `openssl rand -hex 24`)", err=True)
        raise typer.Exit(2)
    typer.echo(hash_key(key))


@contextmanager
def _recorded_deprecations() -> Iterator[list[str]]:
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


def _overrides(*, host: str | None, port: int | None, policy: str | None, log_level: str | None) -> dict[str, Any]:
    """Return the values of the command line by their dotted key."""
    given = {
        "server.host": host,
        "server.port": port,
        "policy": None if policy is None else {"name": policy},
        "logging.level": log_level,
    }
    return {key: value for key, value in given.items() if value is not None}


def _load(path: Path, overrides: dict[str, Any]) -> tuple[Any, list[str]]:
    """Return the configuration with ``overrides``, and its deprecations. Exits 2 if it is invalid."""
    from gateway.config.file import ConfigError, load

    try:
        with _recorded_deprecations() as deprecations:
            config = load(path, overrides=overrides)
    except ConfigError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from error
    return config, deprecations


def main() -> None:
    """Run the `antares` command."""
    app()
