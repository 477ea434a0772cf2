"""Runs OpenAI servers as Ray actors until SIGTERM: `python -m engine_adapter.ray --replicas 2 -- vllm serve ...`."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import threading
from pathlib import Path

from engine_adapter.ray.replicas import Replicas

REFRESH_S = 1.0
"""Seconds between two looks at the actors. Convention: below the gateway's `discover.every_s`."""


def main() -> None:
    """Start the servers, watch them, and stop them on SIGTERM or SIGINT."""
    parser = argparse.ArgumentParser(prog="python -m engine_adapter.ray", description=__doc__)
    parser.add_argument("--replicas", type=int, default=1, help="number of servers")
    parser.add_argument("--gpus", type=float, default=0, help="GPUs of each server")
    parser.add_argument("--cpus", type=float, default=1, help="CPU cores of each server")
    parser.add_argument("--resource", action="append", default=[], help="another Ray resource of each: NAME=AMOUNT")
    parser.add_argument("--file", type=Path, required=True, help="file for the URLs: the gateway's discover.file")
    parser.add_argument("--address", help="address of a Ray cluster; without it one starts on this machine")
    parser.add_argument("--node-ip", help="this machine's address in the cluster, if it is not the default one")
    parser.add_argument("--drain-s", type=float, default=120, help="seconds that servers have to finish requests")
    parser.add_argument("command", nargs="+", help="the server, with {host} and {port} in place of its address")
    given = parser.parse_args()
    if not any("{port}" in word for word in given.command):
        parser.error("the command needs {port}, such as --port {port}")
    bundle = {"CPU": given.cpus, "GPU": given.gpus}
    for resource in given.resource:
        name, _, amount = resource.partition("=")
        bundle[name] = float(amount)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    new = {"include_dashboard": False} if given.address is None else {"address": given.address}
    ray.init(**new, log_to_driver=False, _node_ip_address=given.node_ip)
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    needed = {name: amount for name, amount in bundle.items() if amount}
    replicas = Replicas(given.command, given.replicas, needed, given.file)
    replicas.start()
    while not stopped.wait(REFRESH_S):
        replicas.refresh()
    replicas.stop(given.drain_s)
    ray.shutdown()


if __name__ == "__main__":
    main()
