"""The `antares` command. Each command imports heavy modules only when it runs."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

LAZY_COMMANDS = {
    "key": ("gateway.key_commands", "Make, list and revoke API keys."),
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
config_app = typer.Typer(help="Check and reload configuration files, and hash API keys.", no_args_is_help=True)
app.add_typer(config_app, name="config")

KeyEnv = Annotated[
    str | None,
    typer.Option(help="Environment variable with the API key; by default ANTARES_OPERATOR_KEY or ANTARES_API_KEY."),
]
Url = Annotated[str, typer.Option(help="URL of the gateway.")]
PORT = os.environ.get("ANTARES_PORT", "")
LOCAL_URL = f"http://127.0.0.1:{PORT if PORT.isdecimal() else 8100}"
"""The gateway of this machine or container: `antares serve` listens on ``ANTARES_PORT`` too."""
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
    processes: Annotated[int | None, typer.Option(help="Processes that share the port and divide the engines.")] = None,
    policy: Annotated[
        str | None, typer.Option(help="Use this policy, with its default options, instead of policy.name.")
    ] = None,
    log_level: Annotated[
        str | None, typer.Option(help="debug, info, warning or error, instead of logging.level.")
    ] = None,
) -> None:
    """Start the gateway, its engines and the predictor process."""
    from gateway.processes.run import run_gateway

    overrides = _overrides(host=host, port=port, processes=processes, policy=policy, log_level=log_level)
    raise typer.Exit(run_gateway(config, overrides))


@app.command()
def top(
    url: Url = LOCAL_URL,
    key_env: KeyEnv = None,
    once: Annotated[bool, typer.Option("--once", help="Print one frame and exit.")] = False,
) -> None:
    """Show the state of a gateway in the terminal, as its dashboard does. Press q to leave."""
    import asyncio

    from rich.console import Console

    from gateway.top import TopError, run

    key = _key(key_env)
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

    from gateway.config.file import load, recorded_deprecations
    from gateway.config.mistakes import ConfigError

    try:
        with recorded_deprecations() as deprecations:
            config = load(file)
    except ConfigError as error:
        if as_json:
            found = [{"line": m.line, "key": m.key, "reason": m.reason} for m in error.mistakes]
            typer.echo(orjson.dumps({"ok": False, "mistakes": found}).decode())
        else:
            typer.echo(str(error), err=True)
        raise typer.Exit(1) from error
    for caution in [*deprecations, *config.cautions(config.server.processes)]:
        typer.echo(f"{file}: {caution}", err=True)
    typer.echo(orjson.dumps({"ok": True, "mistakes": []}).decode() if as_json else f"{file}: ok")


@config_app.command("reload")
def config_reload(
    url: Url = LOCAL_URL,
    pid: Annotated[
        int | None, typer.Option(min=1, help="Send SIGHUP to this process instead; its log has the result.")
    ] = None,
    key_env: KeyEnv = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the gateway's JSON document on stdout.")] = False,
) -> None:
    """Have a running gateway read its configuration file again, and print what changed.

    If the gateway has API keys, the command needs a key with `operator: true`. Exit codes: 1 if the
    file has mistakes, which change nothing; 2 if the gateway did not reload for another reason.
    """
    import orjson

    from gateway.operator_client import Unreachable, call, reload_lines

    if pid is not None:
        _hang_up(pid)
        return
    try:
        # The gateway waits for its engines, if they are starting.
        status, document = call("POST", f"{url.rstrip('/')}/reload", 300, _key(key_env))
    except Unreachable as error:
        typer.echo(f"antares: {error}", err=True)
        raise typer.Exit(2) from error
    if not isinstance(document, dict) or "ok" not in document:
        refusal = document.get("error") if isinstance(document, dict) else None
        message = refusal.get("message", "") if isinstance(refusal, dict) else ""
        typer.echo(f"antares: {url} answered {status}: {message or 'this is no gateway that can reload'}", err=True)
        raise typer.Exit(2)
    if as_json:
        typer.echo(orjson.dumps(document).decode())
    else:
        for line in reload_lines(document):
            typer.echo(line, err=not document["ok"])
    raise typer.Exit(0 if document["ok"] else 1)


def _key(variable: str | None) -> str | None:
    """Return the API key to send. Exits 2 if ``variable`` is named but not set."""
    from gateway.operator_client import NoKeyError, key_from

    try:
        return key_from(variable)
    except NoKeyError as error:
        typer.echo(f"antares: {error}", err=True)
        raise typer.Exit(2) from error


def _hang_up(pid: int) -> None:
    import signal

    try:
        os.kill(pid, signal.SIGHUP)
    except OSError as error:
        typer.echo(f"antares: cannot signal process {pid}: {error.strerror}", err=True)
        raise typer.Exit(2) from error
    typer.echo(f"sent SIGHUP to process {pid}; its log says what changed")


@app.command()
def health(
    url: Url = LOCAL_URL,
    ready: Annotated[bool, typer.Option("--ready", help="Also require that an engine can serve requests.")] = False,
    timeout_s: Annotated[float, typer.Option("--timeout", help="Seconds to wait for the answer.")] = 4.0,
) -> None:
    """Exit 0 if the gateway answers, else 1, and say why. For health checks of containers."""
    from gateway.operator_client import Unreachable, call

    try:
        status, document = call("GET", f"{url.rstrip('/')}/{'ready' if ready else 'health'}", timeout_s)
    except Unreachable as error:
        typer.echo(f"antares: {error}", err=True)
        raise typer.Exit(1) from error
    why = document.get("why", "") if isinstance(document, dict) else ""
    typer.echo("ok" if status == 200 else f"not ready: {why}" if why else f"status {status}", err=status != 200)
    raise typer.Exit(0 if status == 200 else 1)


@config_app.command("hash-key")
def config_hash_key() -> None:
    """Read an API key from standard input and print its digest for `keys:`."""
    from gateway.api.auth import hash_key

    key = typer.prompt("API key", hide_input=True) if sys.stdin.isatty() else sys.stdin.readline().strip()
    if len(key) < 16:
        typer.echo("antares: an API key needs at least 16 characters (try `openssl rand -hex 24`)", err=True)
        raise typer.Exit(2)
    typer.echo(hash_key(key))


@app.command()
def explain(
    request_id: Annotated[
        str, typer.Argument(help="The x-request-id of the response, or the id in the gateway's log.")
    ],
    url: Url = LOCAL_URL,
    key_env: KeyEnv = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the record as JSON instead.")] = False,
) -> None:
    """Explain why a request was rejected or late: what was decided, where its time went and what would help."""
    from urllib.parse import quote

    import httpx
    import orjson

    from gateway.operator_client import UNREACHABLE_HINT

    key = _key(key_env)
    headers = {"authorization": f"Bearer {key}"} if key else {}
    try:
        address = f"{url.rstrip('/')}/v1/requests/{quote(request_id, safe='')}"
        answer = httpx.get(address, headers=headers, timeout=10)
        document = orjson.loads(answer.content)
    except (httpx.HTTPError, httpx.InvalidURL, UnicodeEncodeError) as error:
        typer.echo(f"antares: cannot ask {url}: {type(error).__name__}: {error}. {UNREACHABLE_HINT}", err=True)
        raise typer.Exit(1) from None
    except orjson.JSONDecodeError:
        typer.echo(f"antares: {url} answered {answer.status_code} without JSON; is it an Antares gateway?", err=True)
        raise typer.Exit(1) from None
    if answer.status_code != 200:
        problem = document.get("error") if isinstance(document, dict) else None
        message = problem.get("message") if isinstance(problem, dict) else None
        typer.echo(f"antares: {message or f'{url} answered {answer.status_code}'}", err=True)
        raise typer.Exit(1)
    if as_json:
        typer.echo(orjson.dumps(document, option=orjson.OPT_INDENT_2).decode())
        return
    if not isinstance(document, dict) or document.get("object") != "antares.request":
        typer.echo(f"antares: {url} answered with something else; is it an Antares gateway?", err=True)
        raise typer.Exit(1)
    from gateway.observability.explanation import explain as explained

    typer.echo(explained(document))


def _overrides(
    *, host: str | None, port: int | None, processes: int | None, policy: str | None, log_level: str | None
) -> dict[str, Any]:
    """Return the values of the command line by their dotted key."""
    given = {
        "server.host": host,
        "server.port": port,
        "server.processes": processes,
        "policy": None if policy is None else {"name": policy},
        "logging.level": log_level,
    }
    return {key: value for key, value in given.items() if value is not None}


def main() -> None:
    """Run the `antares` command."""
    app()
