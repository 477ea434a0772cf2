"""Compares the overhead of this gateway with that of other gateways, in front of one scripted upstream.

    python -m benchmarks.overhead.peers
    python -m benchmarks.overhead.peers --json > docs/results/peers.json
    python -m benchmarks.overhead.peers --page docs/results/peers.json
    python -m benchmarks.overhead.peers --server antares --server vllm-router --rounds 3

Each peer is looked for in a virtual environment of its own, ``FOLDER/NAME`` (``--peers FOLDER``). A peer that is not
there is skipped, with a line that says how to install it. A round takes about 30 s for each server.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import Annotated

import typer
import uvloop
from rich.console import Console
from rich.table import Table

from benchmarks import results_json
from benchmarks.command import AsJson, PageOf, write_page
from benchmarks.overhead.peers.measure import measure
from benchmarks.overhead.peers.report import failures, page, tables
from benchmarks.overhead.peers.servers import chosen, default_folder


def main(
    rounds: Annotated[int, typer.Option(min=1, help="Rounds in which the servers take turns.")] = 5,
    as_json: AsJson = False,
    page_of: PageOf = None,
    peers: Annotated[Path | None, typer.Option(help="Folder with a virtual environment for each peer.")] = None,
    only: Annotated[list[str] | None, typer.Option("--server", help="Measure these servers only.")] = None,
) -> None:
    """Measure this gateway and the peers that are installed, in rounds, and report medians and ranges."""
    if page_of is not None:
        write_page(page_of, page)
        return
    try:
        servers, skipped = chosen(peers or default_folder(), only or [])
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--server") from error
    for line in skipped:
        sys.stderr.write(line + "\n")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runs = runner.run(measure(servers, rounds))
    if as_json:
        versions = {server.name: server.version for server in servers if server.version}
        found = {"rounds": rounds, "cpus": os.cpu_count(), "versions": versions, "skipped": skipped, "runs": runs}
        sys.stdout.write(results_json.dumps(found))
        return
    console = Console(width=max(Console().width, 132))
    for title, (heads, rows) in tables(runs).items():
        drawn = Table(title=title)
        for head in heads:
            drawn.add_column(head)
        for row in rows:
            drawn.add_row(*row)
        console.print(drawn)
    for line in failures(runs):
        console.print(line)


if __name__ == "__main__":
    typer.run(main)
