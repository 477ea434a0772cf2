"""The servers to compare: the upstream itself, this gateway, and the peers that are installed."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from benchmarks.overhead.peers.client import API_KEY
from benchmarks.overhead.peers.upstream import MODEL

TREE = Path(__file__).parents[3]
"""The checkout whose gateway is measured."""

DIRECT, BASELINE = "direct", "production-stack"
"""The upstream itself, and the gateway that the others are compared with: it is written in Python too."""

MAX_STREAMS = 4096

Command = Callable[[int, str, Path], list[str]]
"""From a port, the upstream's URL and a folder for files, to the command line."""


@dataclass(frozen=True, slots=True)
class Server:
    """A server to measure. ``command`` is None for the upstream itself."""

    name: str
    version: str = ""
    command: Command | None = None
    env: dict[str, str] = field(default_factory=dict)


def antares_config(
    port: int, upstream: str, predictor: bool = True, policy: str | None = None, processes: int = 1
) -> dict[str, Any]:
    """Return a configuration with an API key and, unless ``policy`` names one, the default policy.

    Several ``processes`` divide engines, so the upstream stands for as many.
    """
    engine = {"kind": "http", "base_url": upstream, "max_num_seqs": MAX_STREAMS}
    return {
        "server": {"port": port, "processes": processes},
        "engines": [{**engine, "name": f"upstream-{number}"} for number in range(processes)],
        "predictor": {"enabled": predictor},
        "classes": {"chat": {"ttft_ms": 10_000, "tpot_ms": 1_000, "max_waiting": MAX_STREAMS}},
        "default_class": "chat",
        "keys": [{"sha256": hashlib.sha256(API_KEY.encode()).hexdigest(), "tenant": "benchmark"}],
        **({} if policy is None else {"policy": {"name": policy}}),
    }


def _antares(**settings: Any) -> Command:
    """Return the command of `antares serve`. ``settings``: of `antares_config`."""

    def command(port: int, upstream: str, folder: Path) -> list[str]:
        config = folder / f"antares-{port}.yaml"
        config.write_text(yaml.safe_dump(antares_config(port, upstream, **settings)), encoding="utf-8")
        return [sys.executable, "-c", "from gateway.cli import main; main()", "serve", "--config", str(config)]

    return command


_HERE = {"PYTHONPATH": str(TREE)}

ANTARES, TWO = "antares", "antares, 2 processes"

OURS = (
    Server(ANTARES, command=_antares(), env=_HERE),
    Server(TWO, command=_antares(processes=2), env=_HERE),
    Server("antares, no predictor", command=_antares(predictor=False), env=_HERE),
    Server("antares, no predictor, fcfs", command=_antares(predictor=False, policy="fcfs"), env=_HERE),
)


def _vllm_router(python: Path) -> Command:
    def command(port: int, upstream: str, folder: Path) -> list[str]:
        return [
            str(python.with_name("vllm-router")),
            *("--host", "127.0.0.1", "--port", str(port), "--worker-urls", upstream, "--policy", "round_robin"),
            *("--prometheus-host", "127.0.0.1", "--prometheus-port", str(port + 1)),
            *("--max-concurrent-requests", str(MAX_STREAMS)),
        ]

    return command


def _production_stack(python: Path) -> Command:
    def command(port: int, upstream: str, folder: Path) -> list[str]:
        return [
            str(python.with_name("vllm-router")),
            *("--host", "127.0.0.1", "--port", str(port), "--service-discovery", "static"),
            *("--static-backends", upstream, "--static-models", MODEL, "--routing-logic", "roundrobin"),
        ]

    return command


def litellm_config(upstream: str) -> dict[str, Any]:
    """Return a configuration with the same API key as this gateway's."""
    params = {"model": f"openai/{MODEL}", "api_base": f"{upstream}/v1", "api_key": API_KEY}
    return {
        "model_list": [{"model_name": MODEL, "litellm_params": params}],
        "general_settings": {"master_key": API_KEY},
    }


def _litellm(python: Path) -> Command:
    def command(port: int, upstream: str, folder: Path) -> list[str]:
        config = folder / f"litellm-{port}.yaml"
        config.write_text(yaml.safe_dump(litellm_config(upstream)), encoding="utf-8")
        start = [str(python.with_name("litellm")), "--config", str(config), "--host", "127.0.0.1"]
        return [*start, "--port", str(port), "--num_workers", "1"]

    return command


@dataclass(frozen=True, slots=True)
class Peer:
    """Another gateway, in the virtual environment ``FOLDER/name``."""

    name: str
    requirement: str
    """What pip installs."""
    distribution: str
    start: Callable[[Path], Command]
    env: dict[str, str] = field(default_factory=dict)
    note: str = ""

    def found(self, folder: Path) -> Server | None:
        """Return the installed peer, None if ``folder`` has none that runs."""
        python = folder / self.name / "bin" / "python"
        ask = f"from importlib.metadata import version; print(version({self.distribution!r}))"
        try:
            asked = subprocess.run([python, "-c", ask], capture_output=True, text=True, timeout=30, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return None
        if asked.returncode != 0:
            return None
        return Server(self.name, asked.stdout.strip(), self.start(python.absolute()), self.env)

    def how_to_install(self, folder: Path) -> str:
        """Return the commands that install the peer."""
        venv = folder / self.name
        return f"python -m venv {venv} && {venv}/bin/pip install '{self.requirement}'{self.note}"


PEERS = (
    Peer("vllm-router", "vllm-router==0.1.17", "vllm-router", _vllm_router),
    Peer(
        BASELINE,
        "git+https://github.com/vllm-project/production-stack",
        "vllm-router",
        _production_stack,
        {"HF_HUB_OFFLINE": "1"},
        " (Python 3.12 or newer)",
    ),
    Peer(
        "litellm",
        "litellm[proxy]",
        "litellm",
        _litellm,
        # Without these it reads its price list and its news from the network at start.
        {
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",
            "LITELLM_MODE": "PRODUCTION",
            "LITELLM_LOCAL_POLICY_TEMPLATES": "True",
        },
    ),
)


def default_folder() -> Path:
    """Return the cache folder in which peers are looked for."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "antares-peers"


def chosen(folder: Path, names: Sequence[str]) -> tuple[list[Server], list[str]]:
    """Return the servers to measure and a line for each peer that is not installed. Empty ``names`` mean all.

    Raises:
        ValueError: there is no server of such a name.
    """
    known = [server.name for server in OURS] + [peer.name for peer in PEERS]
    if unknown := sorted(set(names) - set(known)):
        raise ValueError(f"unknown: {', '.join(unknown)}; choose from {', '.join(known)}")
    servers, skipped = [Server(DIRECT)], []
    servers += [server for server in OURS if not names or server.name in names]
    for peer in PEERS:
        if names and peer.name not in names:
            continue
        if (server := peer.found(folder)) is None:
            skipped.append(f"{peer.name}: not installed, skipped. To install it: {peer.how_to_install(folder)}")
        else:
            servers.append(server)
    return servers, skipped
