"""Every query of the Grafana dashboard returns data from a real Prometheus that scrapes a gateway under load."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from benchmarks.faults.server import FaultyServer
from tests.fixtures import prometheus
from tests.fixtures.live_gateway import CHAT, chat
from tests.fixtures.live_server import serve
from tests.fixtures.prometheus import DEPLOYED, Prometheus

pytestmark = pytest.mark.process

DASHBOARD = json.loads((DEPLOYED.parent / "grafana" / "dashboards" / "antares.json").read_text())
VARIABLES = {"__rate_interval": "10s", "__range": "1m"}

CONFIG = """\
server: {port: 0, drain_s: 5}
engines:
  - {kind: simulated, step_times: {d: 0.004, b: 0.0001}, gate: slack}
  - {kind: http, name: broken, base_url: "URL", aliases: {simulated: m}}
predictor: {port: PORT}
policy: {name: slack}
default_class: chat
classes: {chat: {ttft_ms: 2000, tpot_ms: 200}, tight: {ttft_ms: 10, tpot_ms: 5}, batch: {}}
logging: {access: json, access_path: "LOG"}
"""


def queries() -> Iterator[tuple[str, str]]:
    """Yield the title of each panel with each of its queries, with values for the variables."""
    values = dict(VARIABLES)
    for variable in DASHBOARD["templating"]["list"]:
        values[variable["name"]] = ".*" if variable["type"] == "query" else str(variable["query"])
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", []):
            yield panel["title"], re.sub(r"\$\{?(\w+)\}?", lambda found: values[found[1]], target["expr"])


async def load(http: httpx.AsyncClient) -> None:
    """Send a chat of every class, one that is rejected, and one that is late."""

    async def ask(slo_class: str, max_tokens: int = 16, **headers: str) -> None:
        body = chat("tell me a story " * 20, max_tokens=max_tokens, ignore_eos=True, stream=True)
        await http.post(CHAT, json=body, headers={"x-slo-class": slo_class, **headers})

    async with asyncio.TaskGroup() as group:
        for slo_class in ("chat", "tight", "batch"):
            group.create_task(ask(slo_class))
        group.create_task(ask("chat", **{"x-slo-ttft-ms": "0.01"}))
        # It states a length that it exceeds, so it is admitted and late.
        group.create_task(ask("chat", 60, **{"x-slo-e2e-ms": "150", "x-slo-output-tokens": "4"}))


async def without_data(server: Prometheus) -> dict[str, str]:
    """Return the queries that have no value other than NaN, by panel."""
    missing = {}
    for title, query in queries():
        values = [series["value"][1] for series in await server.query(query)]
        if all(value == "NaN" for value in values):
            missing[f"{title}: {query}"] = str(values)
    return missing


async def test_every_dashboard_query_returns_data_under_load(tmp_path: Path) -> None:
    async with serve(FaultyServer(fault="500")) as url:
        config = CONFIG.replace("URL", url).replace("LOG", str(tmp_path / "access.jsonl"))
        async with prometheus.scraping(tmp_path, config, load) as server:
            # Not until a timeout, so that a failure names the queries.
            for _ in range(60):
                await asyncio.sleep(1)
                missing = await without_data(server)
                if not missing:
                    break
            assert missing == {}
            assert len(list(queries())) > 60
        assert (tmp_path / "access.jsonl").read_text().count("\n") > 20
