"""The `antares` command. Heavy imports happen inside the commands that need them."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

app = typer.Typer(
    name="antares",
    help="Antares: an SLO-first serving gateway for vLLM.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
config_app = typer.Typer(help="Check configuration files, hash API keys.", no_args_is_help=True)
app.add_typer(config_app, name="config")

PASSED_ON: dict[str, Any] = {
    "context_settings": {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    "add_help_option": False,
}
"""For a command whose arguments another command line reads."""

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
    policy: Annotated[str | None, typer.Option(help="Use this policy, with its defaults.")] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.")] = None,
) -> None:
    """Serve OpenAI clients under SLOs: the gateway, its engines, and the predictor's process."""
    import asyncio

    loaded = _load(config, host=host, port=port, policy=policy, log_level=log_level)
    from gateway import logs
    from gateway.serve import ServeError
    from gateway.serve import serve as run

    logs.configure(loaded.logging.level, loaded.logging.format)
    try:
        if sys.platform == "win32":
            asyncio.run(run(loaded))
        else:
            import uvloop

            uvloop.run(run(loaded))
    except ServeError as error:
        typer.echo(f"antares: {error}", err=True)
        raise typer.Exit(1) from error
    except (KeyboardInterrupt, asyncio.CancelledError):
        raise typer.Exit(130) from None


@app.command(**PASSED_ON)
def predictor(context: typer.Context) -> None:
    """The output-length predictor: train, evaluate, serve (a process of its own)."""
    # The gateway knows the predictor through HTTP only; so does its command line, which steps aside for the other's.
    _step_aside("predictor_service.cli", context.args)


@app.command(**PASSED_ON)
def simulate(context: typer.Context) -> None:
    """Plan capacity and compare policies in virtual time, without a GPU."""
    _step_aside("benchmarks.cli", ["simulate", *context.args])


@app.command(**PASSED_ON)
def bench(context: typer.Context) -> None:
    """Measure any OpenAI-compatible server under a workload with SLOs."""
    _step_aside("benchmarks.cli", ["bench", *context.args])


@app.command(**PASSED_ON)
def profile(context: typer.Context) -> None:
    """Make a step-time profile of an engine, or show one."""
    _step_aside("benchmarks.cli", ["profile", *context.args])


def _step_aside(module: str, arguments: list[str]) -> NoReturn:
    """Become another command line: rooms that the gateway must not import have their own."""
    os.execv(sys.executable, [sys.executable, "-m", module, *arguments])


@config_app.command("check")
def config_check(
    file: Annotated[Path, typer.Argument(help="The file to check.")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Say whether FILE can be used; if not, every mistake with its line, key and reason."""
    import orjson

    from gateway.config_file import ConfigError, load

    try:
        cautions = load(file).cautions()
    except ConfigError as error:
        if as_json:
            found = [{"line": m.line, "key": m.key, "reason": m.reason} for m in error.mistakes]
            typer.echo(orjson.dumps({"ok": False, "mistakes": found}).decode())
        else:
            typer.echo(str(error), err=True)
        raise typer.Exit(1) from error
    for caution in cautions:
        typer.echo(f"{file}: {caution}", err=True)
    typer.echo(orjson.dumps({"ok": True, "mistakes": []}).decode() if as_json else f"{file}: ok")


@config_app.command("hash-key")
def config_hash_key() -> None:
    """Read an API key from standard input and print the digest that `keys:` takes."""
    from gateway.auth import hash_key

    key = typer.prompt("API key", hide_input=True) if sys.stdin.isatty() else sys.stdin.readline().strip()
    if len(key) < 16:
        typer.echo("antares: a key needs at least 16 characters (try `openssl rand -hex 24`)", err=True)
        raise typer.Exit(2)
    typer.echo(hash_key(key))


def _load(path: Path, *, host: str | None, port: int | None, policy: str | None, log_level: str | None) -> Any:
    """The configuration with the command line's overrides; exits 2 when it cannot be used."""
    from gateway.config_file import ConfigError, load

    overrides = {
        "server.host": host,
        "server.port": port,
        "policy": None if policy is None else {"name": policy},
        "logging.level": log_level,
    }
    try:
        return load(path, overrides={key: value for key, value in overrides.items() if value is not None})
    except ConfigError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from error


def main() -> None:
    """Entry point of the `antares` command."""
    app()
