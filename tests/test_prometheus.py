"""A real Prometheus with the deployed configuration scrapes a gateway under load."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx
import pytest
import yaml

from tests.fixtures import prometheus
from tests.fixtures.live_gateway import CHAT, chat
from tests.fixtures.live_server import HANG_S
from tests.fixtures.prometheus import DEPLOYED, promtool

pytestmark = pytest.mark.process

CONFIG = """\
server: {port: 0, drain_s: 5}
engines: [{kind: simulated, step_times: {d: 0.005, b: 0.0001}}]
predictor: {port: PORT}
default_class: chat
classes: {chat: {ttft_ms: 2000, tpot_ms: 200}, tight: {ttft_ms: 10, tpot_ms: 1}, batch: {}}
"""


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


async def load(http: httpx.AsyncClient) -> None:
    """Send a chat of every class; some are rejected."""
    body = chat(max_tokens=16, ignore_eos=True, stream=True)
    async with asyncio.TaskGroup() as group:
        for slo_class in ("chat", "tight", "batch"):
            group.create_task(http.post(CHAT, json=body, headers={"x-slo-class": slo_class}))


async def test_prometheus_scrapes_a_gateway_under_load_and_evaluates_all_rules(tmp_path: Path) -> None:
    async with prometheus.scraping(tmp_path, CONFIG, load) as server:
        await server.wait_evaluated()
        rate = "sum(rate(antares_requests_total[5s]))"
        async with asyncio.timeout(HANG_S):
            # Rates need two samples.
            while not (found := await server.query(rate)) or float(found[0]["value"][1]) <= 1:
                await asyncio.sleep(0.2)
        # A scrape may time out on a loaded machine.
        await server.wait_up(2)
        rules = await server.rules()
        assert len(rules) >= 9
        assert {rule["name"]: rule.get("lastError", "") for rule in rules if rule["health"] != "ok"} == {}
        for rule in rules:
            if rule["type"] == "recording":
                assert await server.query(rule["name"]), rule["name"]
