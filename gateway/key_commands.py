"""`antares key`: make, list and revoke the API keys in the keys file of a configuration."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from gateway.api.auth import hash_key, key_id
from gateway.config.file import load
from gateway.config.keys import SHARED, KeyConfig
from gateway.config.keys_file import keys_path, locked, read_keys, write_keys
from gateway.config.mistakes import ConfigError
from gateway.config.schema import GatewayConfig

KEY_PREFIX = "antares-"
"""Beginning of every key, by which tools that search for secrets know it."""

KEY_BYTES = 24
"""Random bytes of a key: more than can be guessed, so a plain hash protects it."""

app = typer.Typer(help="Make, list and revoke API keys.", no_args_is_help=True, add_completion=False)

ConfigPath = Annotated[Path, typer.Option("--config", "-c", help="Configuration file that names the keys_file.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]


@dataclass(slots=True)
class _Keys:
    """The keys file of a configuration, and both ``loaded``."""

    config: Path
    path: Path
    entries: list[dict[str, Any]]
    loaded: GatewayConfig

    def check(self, entries: Sequence[Any]) -> None:
        """Raise `ConfigError` if the file may not hold ``entries``."""
        load(self.config, keys=entries)


@app.command()
def new(
    config: ConfigPath,
    tenant: Annotated[
        str, typer.Option(help="Tenant of the key: label in metrics; shares and limits are the tenant's.")
    ],
    default_class: Annotated[str | None, typer.Option(help="SLO class of requests that name none.")] = None,
    allow_class: Annotated[
        list[str] | None, typer.Option(help="SLO class that the key may use; repeatable. By default all.")
    ] = None,
    allow_model: Annotated[
        list[str] | None, typer.Option(help="Model that the key may use; repeatable. By default all.")
    ] = None,
    min_ttft_ms: Annotated[float | None, typer.Option(help="Strictest x-slo-ttft-ms that the key may send.")] = None,
    min_tpot_ms: Annotated[float | None, typer.Option(help="Strictest x-slo-tpot-ms that the key may send.")] = None,
    min_e2e_ms: Annotated[float | None, typer.Option(help="Strictest x-slo-e2e-ms that the key may send.")] = None,
    weight: Annotated[
        float | None, typer.Option(help="The tenant's share of an engine, relative to other tenants.")
    ] = None,
    requests_per_minute: Annotated[
        int | None, typer.Option(help="Requests per minute of the tenant; above it 429.")
    ] = None,
    tokens_per_minute: Annotated[
        int | None, typer.Option(help="Prompt and output tokens per minute of the tenant.")
    ] = None,
    max_concurrent: Annotated[
        int | None, typer.Option(help="Requests that the tenant may have open at a time.")
    ] = None,
    update_tenant: Annotated[
        bool, typer.Option("--update-tenant", help="Give the tenant's other keys this weight and these limits too.")
    ] = False,
    expires: Annotated[
        str | None, typer.Option(help="End of the key: days from now (30d), hours (12h), or an ISO 8601 time.")
    ] = None,
    operator: Annotated[
        bool, typer.Option("--operator", help="Let the key read metrics, status and all requests, and reload.")
    ] = False,
) -> None:
    """Make a random key, print it once on stdout, and keep its digest in the keys file."""
    key = KEY_PREFIX + secrets.token_hex(KEY_BYTES)
    given: dict[str, Any] = {
        "sha256": hash_key(key),
        "tenant": tenant,
        "default_class": default_class,
        "allowed_classes": allow_class,
        "allowed_models": allow_model,
        "min_ttft_ms": min_ttft_ms,
        "min_tpot_ms": min_tpot_ms,
        "min_e2e_ms": min_e2e_ms,
        "weight": weight,
        "requests_per_minute": requests_per_minute,
        "tokens_per_minute": tokens_per_minute,
        "max_concurrent": max_concurrent,
        "expires": None if expires is None else _expiry(expires),
        "operator": operator or None,
    }
    with _keys_of(config, may_be_absent=True) as keys:
        entry = {name: value for name, value in given.items() if value not in (None, [])}
        # A further key of a tenant gets what its keys must agree in.
        same = next((key for _, key in keys.loaded.all_keys() if key.tenant == tenant), None)
        for name in SHARED:
            if same is not None and getattr(same, name) is not None:
                entry.setdefault(name, getattr(same, name))
        shared = {name: entry[name] for name in SHARED if name in entry}
        others = [{**o, **shared} if update_tenant and o["tenant"] == tenant else o for o in keys.entries]
        try:
            keys.check([*others, entry])
        except ConfigError as error:
            reasons = (f"{mistake.key.rpartition('].')[2]}: {mistake.reason}" for mistake in error.mistakes)
            hint = " (--update-tenant changes the others)" if "another key of tenant" in str(error) else ""
            _fail(f"no key was made: {'; '.join(reasons)}{hint}", 2)
        write_keys(keys.path, [*others, entry])
    typer.echo(key)
    ident = key_id(entry["sha256"])
    typer.echo(f"key {ident} of tenant {tenant} is in {keys.path}. It is not shown again.", err=True)


@app.command("list")
def list_keys(config: ConfigPath, as_json: AsJson = False) -> None:
    """List the keys: id, tenant, rights, limits and expiry. Only digests are stored, so no key is shown."""
    import orjson

    with _keys_of(config) as keys:
        rows = [_row(place, key) for place, key in keys.loaded.all_keys()]
    if as_json:
        typer.echo(orjson.dumps(rows).decode())
        return
    lines = [("id", "tenant", "expires", "in", "rights and limits")]
    lines += [(row["id"], row["tenant"], _expiry_text(row), row["file"], _rights_text(row)) for row in rows]
    widths = [max(len(line[column]) for line in lines) for column in range(4)]
    for line in lines:
        typer.echo("  ".join([*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[4]]))


@app.command()
def revoke(
    config: ConfigPath,
    ident: Annotated[str | None, typer.Argument(metavar="[ID]", help="The id that `antares key list` shows.")] = None,
    tenant: Annotated[str | None, typer.Option(help="Revoke all keys of this tenant.")] = None,
) -> None:
    """Remove the key ID, or all keys of a tenant, from the keys file. A running gateway follows within a second."""
    if (ident is None) == (tenant is None):
        _fail("give either the id of a key or --tenant", 2)
    with _keys_of(config) as keys:

        def is_meant(entry: dict[str, Any]) -> bool:
            return entry["tenant"] == tenant if ident is None else key_id(entry["sha256"]) == ident

        left = [entry for entry in keys.entries if not is_meant(entry)]
        if len(left) == len(keys.entries):
            elsewhere = any(is_meant(key.model_dump()) for key in keys.loaded.keys)
            where = f"it is under `keys:` in {config}; remove it there" if elsewhere else "`antares key list` shows all"
            _fail(f"no key of {tenant or ident} is in {keys.path}: {where}", 1)
        keys.check(left)
        write_keys(keys.path, left)
    count = len(keys.entries) - len(left)
    typer.echo(f"revoked {count} key{'s' * (count > 1)} of {tenant or ident}; {len(left)} left in {keys.path}")


@contextmanager
def _keys_of(config: Path, may_be_absent: bool = False) -> Iterator[_Keys]:
    """Yield the keys file that ``config`` names, locked. Exits with the mistakes of either file, or what to do."""
    try:
        # Without the keys: their file may not exist yet.
        named = load(config, keys=[]).keys_file
        if named is None:
            _fail(f"{config} has no keys_file. Add the line `keys_file: keys.json` to it.", 1)
        path = keys_path(named.path, config)
        with locked(path):
            absent = may_be_absent and not path.exists()
            entries = [] if absent else read_keys(path)
            yield _Keys(config, path, entries, load(config, keys=entries))
    except ConfigError as error:
        _fail(str(error), 1)
    except OSError as error:
        _fail(f"cannot change the keys file: {error}", 1)


def _row(place: str, key: KeyConfig) -> dict[str, Any]:
    rights = key.model_dump(
        include={"default_class", "allowed_classes", "allowed_models", "min_ttft_ms", "min_tpot_ms", "min_e2e_ms"},
        exclude_none=True,
    )
    if key.operator:
        rights["operator"] = True
    limits = key.model_dump(include=set(SHARED), exclude_none=True)
    expires = key.expires
    return {
        "id": key_id(key.sha256),
        "tenant": key.tenant,
        "rights": rights,
        "limits": limits,
        "expires": None if expires is None else expires.isoformat(),
        "expired": expires is not None and expires <= datetime.now(UTC),
        "file": "keys file" if place.startswith("keys_file") else "configuration",
    }


def _rights_text(row: dict[str, Any]) -> str:
    given = {**row["rights"], **row["limits"]}
    texts = (f"{name}={','.join(value) if isinstance(value, list) else value}" for name, value in given.items())
    return " ".join(texts)


def _expiry_text(row: dict[str, Any]) -> str:
    expires = row["expires"] or "never"
    return f"{expires} (expired)" if row["expired"] else expires


def _expiry(text: str) -> str:
    """Return the time that ``text`` means, in ISO 8601 with a time zone. Exits 2 if it means none."""
    relative = re.fullmatch(r"([1-9]\d{0,4})([dh])", text)
    if relative:
        count = int(relative[1])
        after = timedelta(days=count) if relative[2] == "d" else timedelta(hours=count)
        return (datetime.now(UTC) + after).isoformat(timespec="seconds")
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        _fail(f"--expires: {text[:64]!r} is no time; write 30d, 12h or 2027-01-31T00:00:00Z", 2)
    return (time if time.tzinfo is not None else time.replace(tzinfo=UTC)).isoformat()


def _fail(message: str, code: int) -> NoReturn:
    typer.echo(f"antares: {message}", err=True)
    raise typer.Exit(code)
