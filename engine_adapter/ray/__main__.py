"""Runs OpenAI servers as Ray actors until SIGTERM: `python -m engine_adapter.ray --replicas 2 -- vllm serve ...`."""

from __future__ import annotations

import argparse
import contextlib
import logging
import math
import os
import signal
import threading
from pathlib import Path

from engine_adapter.ray.replicas import START_S, Replicas

log = logging.getLogger("antares.ray")

REFRESH_S = 1.0
"""Seconds between two probes of the servers. Convention: below the gateway's `discover.every_s`."""

LOOPBACK = "127.0.0.1"
"""Servers of a cluster that the launcher starts listen there: all of it, and the gateway, are on this machine."""

RESOURCE_HELP = "another Ray resource of each server: NAME=AMOUNT, such as engine=1"


def _resource(text: str) -> tuple[str, float]:
    """Return name and amount of a resource. Raises `argparse.ArgumentTypeError`."""
    name, _, amount = text.partition("=")
    with contextlib.suppress(ValueError):
        if name and 0 < float(amount) < math.inf:
            return name, float(amount)
    raise argparse.ArgumentTypeError(f"{text!r} is not NAME=AMOUNT, such as engine=1")


def main() -> None:
    """Start the servers, watch them, and stop them on SIGTERM or SIGINT."""
    parser = argparse.ArgumentParser(prog="python -m engine_adapter.ray", description=__doc__)
    parser.add_argument("--replicas", type=int, default=1, help="number of servers")
    parser.add_argument("--gpus", type=float, default=0, help="GPUs of each server")
    parser.add_argument("--cpus", type=float, default=1, help="CPU cores of each server")
    parser.add_argument("--resource", action="append", type=_resource, default=[], help=RESOURCE_HELP)
    parser.add_argument("--file", type=Path, required=True, help="file for the URLs: the gateway's discover.file")
    parser.add_argument("--address", help="address of a Ray cluster; without it one starts on this machine")
    parser.add_argument("--node-ip", help="this machine's address in the cluster, if it is not the default one")
    parser.add_argument("--drain-s", type=float, default=120, help="seconds that servers have to finish requests")
    parser.add_argument("--start-s", type=float, default=START_S, help="seconds that a server has to start")
    parser.add_argument("command", nargs="+", help="the server, with {host} and {port} in place of its address")
    given = parser.parse_args()
    if not any("{port}" in word for word in given.command):
        parser.error("the command needs {port}, such as --port {port}")
    if not given.file.parent.is_dir():
        parser.error(f"--file: there is no folder {given.file.parent}")
    bundle = {"CPU": given.cpus, "GPU": given.gpus, **dict(given.resource)}
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    # Without an address, Ray would join the cluster of RAY_ADDRESS, or the latest one on this machine.
    where = {"address": "local", "include_dashboard": False} if given.address is None else {"address": given.address}
    ray.init(**where, log_to_driver=False, _node_ip_address=given.node_ip)
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    needed = {name: amount for name, amount in bundle.items() if amount}
    host = LOOPBACK if given.address is None else None
    replicas = Replicas(given.command, given.replicas, needed, given.file, host, given.start_s)
    try:
        replicas.start()
        while not stopped.wait(REFRESH_S):
            try:
                replicas.refresh()
            except Exception as error:
                # The servers go on. An example is a full disk under the file.
                log.error("cannot update %s: %s", given.file, error, exc_info=error)
    finally:
        replicas.stop(given.drain_s)
        ray.shutdown()


if __name__ == "__main__":
    main()
