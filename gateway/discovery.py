"""Finds the servers of `kind: http` engines with `discover`: one engine for each address of the host in `base_url`,
or for each URL in a file.

Of several gateways that divide the engines, each follows its share only.

A new address is an engine that starts. An address that disappears is an engine that leaves, as after a reload of the
configuration (`gateway.engines`). A look-up that fails or finds no address changes nothing, because a failing name
server must not stop the engines. Health probes see servers that are down.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
from collections.abc import Awaitable, Callable, Iterable, Sequence, Set
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import orjson

from engine_adapter.server_url import server_url
from gateway.config.engines import EngineConfig, HttpEngineConfig, fixed_pools
from gateway.scheduling.shards import Shard

log = logging.getLogger("antares.discovery")

LOOK_UP_TIMEOUT_S = 5.0
"""Seconds to wait for the name server. Convention: the default timeout of resolv.conf."""

IDLE_S = 1.0
"""Seconds between two checks for a reload that adds the first `discover`. Convention."""

MAX_FILE_BYTES = 1 << 20
"""Largest file of engines in bytes; thousands of URLs take less."""

_FORMAT = (
    'it must be an object with one member, "engines": a list of http and https URLs, or of objects with "url" and '
    '"report_port"'
)

Resolve = Callable[[str, int], Awaitable[Iterable[str]]]
"""Returns the IP addresses of a host. Raises OSError."""


async def resolve(host: str, port: int) -> list[str]:
    """Return the IP addresses of ``host``: the IPv4 ones, or else the IPv6 ones. Raises OSError.

    A server with both kinds of addresses is one engine, not two.
    """
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    four = [str(address[0]) for family, *_, address in found if family == socket.AF_INET]
    return four or [str(address[0]) for family, *_, address in found if family == socket.AF_INET6]


def read_servers(path: str) -> dict[str, int | None]:
    """Return the base URLs in the file at ``path``, each with the port of its report channel, None if it has no own.

    The file is a JSON object with the member "engines": a list of URLs, and of objects with "url" and "report_port".
    Raises OSError or ValueError.
    """
    with Path(path).open("rb") as file:
        content = file.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise ValueError(f"it is larger than {MAX_FILE_BYTES >> 20} MiB")
    document = orjson.loads(content)
    entries = document.get("engines") if isinstance(document, dict) else None
    if not isinstance(entries, list):
        raise ValueError(_FORMAT)
    return dict(map(_server, entries))


def _server(entry: Any) -> tuple[str, int | None]:
    """Return URL and report port of an entry in the file. Raises ValueError."""
    url, port = (entry.get("url"), entry.get("report_port")) if isinstance(entry, dict) else (entry, None)
    if not isinstance(url, str):
        raise ValueError(_FORMAT)
    try:
        server_url(url)
    except ValueError as error:
        raise ValueError(f"a URL in it {error}") from None
    if port is not None and (type(port) is not int or not 0 < port < 1 << 16):
        raise ValueError(f"the report_port of {url[:200]} is not a port")
    return url.rstrip("/"), port


class Discovery:
    """Knows the servers behind each engine section that has `discover`. ``resolve`` asks the name server.

    ``shard``: the share of this gateway. Each pool is divided by itself, so every gateway has engines of each.

    A server keeps its number while it is known. The numbers of servers that are gone are used again, so the names of
    engines, and with them the labels of metrics, stay few however often servers are replaced.
    """

    def __init__(self, resolve: Resolve = resolve, shard: Shard = Shard()) -> None:  # noqa: B008 - it is immutable
        self._resolve = resolve
        self._shard = shard
        self._shares: dict[tuple[str, str], tuple[int, int]] = {}
        self._numbers: dict[tuple[str, str], dict[str, int]] = {}
        self._report_ports: dict[tuple[str, str], dict[str, int | None]] = {}
        self._failures: dict[tuple[str, str], str] = {}

    def engines(self, sections: Sequence[EngineConfig]) -> list[list[EngineConfig]]:
        """Return this gateway's engines of each of ``sections``: of other gateways' engines, none.

        Engines in the gateway's process are always its own.
        """
        own = self._own(sections)
        return [self.expand(section) if section.name in own else [] for section in sections]

    def _own(self, sections: Sequence[EngineConfig]) -> set[str]:
        """Return the names of the sections that this gateway has engines of."""
        pools = fixed_pools(sections).values()
        others = {section.name for section in sections}.difference(*pools)
        return others.union(*map(self._shard.share, pools))

    def expand(self, section: EngineConfig) -> list[EngineConfig]:
        """Return the engines of ``section``: one for each known server, or the section itself without `discover`.

        While no server is known, there is one engine at the section's `base_url`.
        """
        if not isinstance(section, HttpEngineConfig) or section.discover is None:
            return [section]
        numbers = self._numbers.get(_key(section))
        if not numbers:
            return [section.model_copy(update={"name": f"{section.name}-0"})]
        ports = self._report_ports.get(_key(section), {})
        return [
            _engine(section, number, url, ports.get(url))
            for url, number in sorted(numbers.items(), key=lambda item: item[1])
        ]

    async def refresh(self, sections: Sequence[EngineConfig]) -> None:
        """Look up the addresses of ``sections`` again, and forget those of other sections."""
        pools = _pools(sections)
        keys = {_key(pool) for pool in pools}
        self._numbers = {key: numbers for key, numbers in self._numbers.items() if key in keys}
        self._report_ports = {key: ports for key, ports in self._report_ports.items() if key in keys}
        self._failures = {key: reason for key, reason in self._failures.items() if key in keys}
        self._shares = {key: share for key, share in self._shares.items() if key in keys}
        await asyncio.gather(*(self._look_up(pool) for pool in pools))

    async def follow(self, sections: Callable[[], Sequence[EngineConfig]], apply: Callable[[], None]) -> None:
        """Look up the addresses of ``sections()`` again and again, and call ``apply`` after each time."""
        failure = ""
        while True:
            every_s = [pool.discover.every_s for pool in _pools(sections()) if pool.discover is not None]
            await asyncio.sleep(min(every_s, default=IDLE_S))
            if not every_s:
                continue
            await self.refresh(sections())
            try:
                apply()
                failure = ""
            except Exception as error:
                if str(error) != failure:
                    failure = str(error)
                    log.error("the engines stay as they are: %s", error, exc_info=log.isEnabledFor(logging.DEBUG))

    async def _look_up(self, pool: HttpEngineConfig) -> None:
        key, source = _key(pool), _source(pool)
        try:
            async with asyncio.timeout(LOOK_UP_TIMEOUT_S):
                found = await self._find(pool)
            reason = "" if found else "there are none"
        except TimeoutError:
            found, reason = {}, f"no answer within {LOOK_UP_TIMEOUT_S:.0f} s"
        except (OSError, ValueError) as error:
            found, reason = {}, str(error)
        if reason and reason != self._failures.get(key):
            known = len(self._numbers.get(key, ()))
            log.warning("engine %s: cannot look up servers in %s: %s; %d are known", pool.name, source, reason, known)
        self._failures[key] = reason
        if found:
            own = self._shard.share(found)
            self._note_share(pool, len(own), len(found))
            self._number(pool, own)
            self._report_ports[key] = found

    def _note_share(self, pool: HttpEngineConfig, own: int, found: int) -> None:
        """Log how many of the servers are this gateway's, whenever that changes."""
        if self._shard.count > 1 and self._shares.get(_key(pool)) != (own, found):
            self._shares[_key(pool)] = own, found
            shared = "" if found >= self._shard.count else ", which it may share: there are fewer servers than gateways"
            log.info("engine %s: %d of %d servers are this gateway's%s", pool.name, own, found, shared)

    async def _find(self, pool: HttpEngineConfig) -> dict[str, int | None]:
        """Return the servers of ``pool``, as `read_servers`. Raises OSError, TimeoutError or ValueError."""
        if pool.discover is not None and pool.discover.file is not None:
            return await asyncio.to_thread(read_servers, pool.discover.file)
        url = urlsplit(pool.base_url)
        addresses = await self._resolve(url.hostname or "", url.port or 80)
        return {_at(pool.base_url, address): None for address in addresses if _is_usable(address)}

    def _number(self, pool: HttpEngineConfig, found: Set[str]) -> None:
        """Give each server of ``found`` that is new a number, and forget the others."""
        assert pool.discover is not None
        old = self._numbers.get(_key(pool), {})
        new = {url: number for url, number in old.items() if url in found}
        for url in sorted(found - old.keys()):
            if len(new) == pool.discover.max_engines:
                log.warning("engine %s: discover.max_engines is %d; ignored: %s", pool.name, len(new), url)
                continue
            # The engine of a server that has just gone may still finish requests under its name.
            taken = {*old.values(), *new.values()}
            new[url] = next(number for number in range(len(taken) + 1) if number not in taken)
            log.info("engine %s-%d is %s", pool.name, new[url], url)
        self._numbers[_key(pool)] = new


def _engine(section: HttpEngineConfig, number: int, url: str, report_port: int | None) -> HttpEngineConfig:
    """Return the section of the server at ``url``. A ``report_port`` of its own replaces that of ``section``."""
    changes: dict[str, Any] = {"name": f"{section.name}-{number}", "base_url": url}
    if section.report is not None and report_port is not None:
        changes["report"] = section.report.model_copy(update={"port": report_port})
    return section.model_copy(update=changes)


def _pools(sections: Sequence[EngineConfig]) -> list[HttpEngineConfig]:
    return [s for s in sections if isinstance(s, HttpEngineConfig) and s.discover is not None]


def _source(pool: HttpEngineConfig) -> str:
    """Return where the servers of ``pool`` are listed: a file or a host."""
    file = None if pool.discover is None else pool.discover.file
    return file or urlsplit(pool.base_url).hostname or ""


def _key(pool: HttpEngineConfig) -> tuple[str, str]:
    return pool.name, (pool.discover and pool.discover.file) or pool.base_url


def _is_usable(address: str) -> bool:
    """Whether a URL can hold the address: not one of a network interface, such as ``fe80::1%eth0``."""
    try:
        return not getattr(ipaddress.ip_address(address), "scope_id", None)
    except ValueError:
        return False


def _at(base_url: str, address: str) -> str:
    """Return ``base_url`` with ``address`` in place of its host."""
    url = urlsplit(base_url)
    host = f"[{address}]" if ":" in address else address
    return url._replace(netloc=host if url.port is None else f"{host}:{url.port}").geturl()
