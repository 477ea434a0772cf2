"""A real Prometheus with the deployed configuration scrapes a gateway under load."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path

import httpx
import pytest
import yaml

from tests.fixtures import prometheus
from tests.fixtures.live_gateway import CHAT, chat
from tests.fixtures.prometheus import DEPLOYED, promtool
from tests.fixtures.served import free_port
from tests.fixtures.served_process import served

pytestmark = pytest.mark.process

CONFIG = """\
server: {port: 0, drain_s: 5}
engines: [{kind: simulated, step_times: {d: 0.005, b: 0.0001}}]
predictor: {port: PORT}
default_class: chat
classes: {chat: {ttft_ms: 2000, tpot_ms: 200}, tight: {ttft_ms: 10, tpot_ms: 1}, batch: {}}
"""

DASHBOARD = DEPLOYED.parent / "grafana" / "dashboards" / "antares.json"
VARIABLES = {"__rate_interval": "10s", "__range": "1m", "__interval": "5s"}
"""Grafana's own variables."""


def test_promtool_accepts_the_configuration(tmp_path: Path) -> None:
    targets = {"antares": "http://127.0.0.1:8100", "antares-predictor": "http://127.0.0.1:8101"}
    config = prometheus.configuration(targets, "a key", tmp_path, 5.0)
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
    checked = promtool("check", "config", tmp_path / "prometheus.yml")
    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.parametrize("file", sorted(DEPLOYED.glob("*_test.yml")), ids=lambda file: file.name)
def test_promtool_passes_the_unit_tests_of_the_rules(file: Path) -> None:
    tested = promtool("test", "rules", file)
    assert tested.returncode == 0, tested.stdout + tested.stderr


def test_promtool_finds_no_fault_in_the_rules() -> None:
    names = yaml.safe_load((DEPLOYED / "prometheus.yml").read_text())["rule_files"]
    checked = promtool("check", "rules", "--lint=all", "--lint-fatal", *names)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def dashboard_queries() -> list[str]:
    """Return the queries of all panels, with values for the variables."""
    dashboard = json.loads(DASHBOARD.read_text())
    panels = [*dashboard["panels"], *(inner for panel in dashboard["panels"] for inner in panel.get("panels", []))]
    values = dict(VARIABLES)
    for variable in dashboard["templating"]["list"]:
        # A query variable takes label values, of which ".*" stands for all.
        values[variable["name"]] = ".*" if variable["type"] == "query" else str(variable["query"])
    return [
        re.sub(r"\$\{?(\w+)\}?", lambda found: values[found[1]], target["expr"])
        for panel in panels
        for target in panel.get("targets", [])
    ]


async def load(http: httpx.AsyncClient, until: asyncio.Event) -> None:
    """Send chats of every class until ``until`` is set; some are rejected."""

    async def ask(slo_class: str) -> None:
        body = chat(max_tokens=16, ignore_eos=True, stream=True)
        await http.post(CHAT, json=body, headers={"x-slo-class": slo_class})

    async with asyncio.TaskGroup() as group:
        while not until.is_set():
            for slo_class in ("chat", "tight", "batch"):
                group.create_task(ask(slo_class))
            await asyncio.sleep(0.05)


async def test_prometheus_scrapes_a_gateway_under_load_and_evaluates_all_rules(tmp_path: Path) -> None:
    prometheus.tool("prometheus")
    port = free_port()
    async with served(tmp_path, CONFIG.replace("PORT", str(port))) as (_, http):
        targets = {"antares": str(http.base_url), "antares-predictor": f"http://127.0.0.1:{port}"}
        done = asyncio.Event()
        loading = asyncio.create_task(load(http, done))
        try:
            async with prometheus.started(tmp_path, targets, interval_s=0.5) as server:
                await server.wait_up(2)
                await server.wait_evaluated()
                # Rates need two samples.
                await asyncio.sleep(3)
                assert await server.targets() == {"antares": "up", "antares-predictor": "up"}
                rules = await server.rules()
                assert len(rules) >= 9
                assert {rule["name"]: rule.get("lastError", "") for rule in rules if rule["health"] != "ok"} == {}
                rate = await server.query("sum(rate(antares_requests_total[5s]))")
                assert float(rate[0]["value"][1]) > 1
                for query in dashboard_queries():
                    await server.query(query)
                for rule in rules:
                    if rule["type"] == "recording":
                        assert await server.query(rule["name"]), rule["name"]
        finally:
            done.set()
            await loading
