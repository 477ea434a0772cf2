"""Reload: the configuration file is read again, and what can change does so without dropping a request."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import ValidationError

from engine_adapter.step_time.linear_forms import StepTimes
from gateway.api.auth import hash_key
from gateway.config.file import load
from gateway.reload import Reloader
from tests.fixtures.live_gateway import CHAT, chat, fast_engine, gateway_config, live
from tests.fixtures.live_server import HANG_S, eventually
from tests.fixtures.served_process import served, until_said

pytestmark = pytest.mark.process

ALICE, BOB = "alice-0123456789abcdef", "bob-0123456789abcdef"


def key(secret: str, tenant: str, **rights: Any) -> dict[str, Any]:
    return {"sha256": hash_key(secret), "tenant": tenant, **rights}


async def test_reload_replaces_keys() -> None:
    async with live(keys=[key(ALICE, "alice")]) as antares:
        assert antares.gateway.reload(gateway_config(keys=[key(BOB, "bob")])).changed == ["keys"]
        assert (await antares.ask(x_api_key=ALICE)).status_code == 401
        assert (await antares.ask(x_api_key=BOB)).status_code == 200


async def test_reload_changes_the_rights_of_a_key() -> None:
    async with live(keys=[key(ALICE, "alice")]) as antares:
        antares.gateway.reload(gateway_config(keys=[key(ALICE, "alice", min_ttft_ms=400, allowed_classes=["chat"])]))
        assert (await antares.ask(x_api_key=ALICE, x_slo_ttft_ms="300")).status_code == 403
        assert (await antares.ask(x_api_key=ALICE, x_slo_class="free")).status_code == 403


async def test_reload_adds_changes_and_removes_classes() -> None:
    async with live() as antares:
        classes = {"new": {"ttft_ms": 7000}, "chat": {"ttft_ms": 6000}}
        done = antares.gateway.reload(gateway_config(classes=classes, default_class="new"))
        assert (done.changed, done.needs_restart) == (["classes", "default_class"], [])
        answer = await antares.ask(x_slo_report="1")
        assert answer.json()["antares"]["slo_ttft_ms"] == 7000
        answer = await antares.ask(x_slo_report="1", x_slo_class="chat")
        assert answer.json()["antares"]["slo_ttft_ms"] == 6000
        answer = await antares.ask(x_slo_class="free")
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "unknown_slo_class")
        assert (await antares.http.get("/status")).json()["classes"]["new"]


async def test_reload_changes_the_limits_of_the_edge() -> None:
    async with live() as antares:
        body = chat("x" * 4000)
        assert (await antares.ask(body, x_long="y" * 6000)).status_code == 200
        limits = {"max_head_bytes": 4096, "max_connections": 50}
        assert antares.gateway.reload(gateway_config(limits=limits)).changed == ["limits"]
        assert antares.gateway.connections.max_connections == 50
        assert (await antares.ask(body)).status_code == 200
        async with httpx.AsyncClient(base_url=antares.url, trust_env=False) as http:
            assert (await http.post(CHAT, json=body, headers={"x-long": "y" * 6000})).status_code == 431


async def test_removed_classes_leave_the_status_of_an_idle_gateway() -> None:
    async with live() as antares:
        for number in range(3):
            antares.gateway.reload(gateway_config(classes={"chat": {}, f"more-{number}": {}}))
        assert (await antares.http.get("/status")).json()["classes"].keys() == {"chat", "more-2"}
        assert (await antares.ask(x_slo_class="more-2")).status_code == 200
        assert (await antares.ask(x_slo_class="more-1")).status_code == 400


async def test_open_requests_of_a_removed_class_are_served() -> None:
    async with live(fast_engine(times=StepTimes(d=0.02), max_num_seqs=1)) as antares:
        body = chat(max_tokens=20, ignore_eos=True, stream=True)
        tasks = [asyncio.create_task(antares.ask(body, x_slo_class="free")) for _ in range(3)]
        await eventually(lambda: len(antares.gateway.engine_queues[0].waiting) == 2)
        antares.gateway.reload(gateway_config(classes={"chat": {}}))
        assert [(await task).status_code for task in tasks] == [200] * 3
        assert antares.outcomes["finished"] == 3


async def test_reload_changes_guarded_fields() -> None:
    async with live() as antares:
        antares.gateway.reload(gateway_config(server={"body_fields": {"on_denied": "reject"}}))
        assert (await antares.ask(chat(priority=1))).status_code == 400
        antares.gateway.reload(gateway_config(server={"body_fields": {"allow": ["priority"]}}))
        antares.echo_bodies()
        assert (await antares.ask(chat(priority=1))).json()["priority"] == 1


@pytest.mark.parametrize(
    ("change", "changed", "needs_restart"),
    [
        ({"policy": {"name": "fcfs"}}, ["policy"], []),
        ({"routing": {"name": "headroom"}}, ["routing"], []),
        ({"server": {"port": 9}}, [], ["server.port"]),
        (
            {"server": {"cors": {"allow_origins": ["*"]}}, "logging": {"format": "json"}},
            ["server.cors"],
            ["logging.format"],
        ),
        ({"predictor": {"enabled": False, "timeout_ms": 9}}, ["predictor.timeout_ms"], ["predictor.expected_tokens"]),
        ({"failover": {"retry_ratio": 0.5}}, ["failover"], []),
        ({}, [], []),
    ],
)
async def test_reload_names_what_changed_and_what_needs_a_restart(
    change: dict[str, Any], changed: list[str], needs_restart: list[str]
) -> None:
    async with live() as antares:
        done = antares.gateway.reload(gateway_config(**change))
        assert (done.changed, done.needs_restart) == (changed, needs_restart)
        # What needs a restart stays a difference; what was applied does not.
        done = antares.gateway.reload(gateway_config(**change))
        assert (done.changed, done.needs_restart) == ([], needs_restart)


async def test_reload_routes_later_requests_by_the_new_policy() -> None:
    async with live() as antares:
        assert antares.gateway.router.routing.name == "least_load"
        antares.gateway.reload(gateway_config(routing={"name": "headroom"}))
        assert antares.gateway.router.routing.name == "headroom"
        assert (await antares.ask()).status_code == 200


async def test_reload_never_opens_a_reachable_gateway() -> None:
    async with live(server={"host": "0.0.0.0"}, keys=[key(ALICE, "alice")]) as antares:
        # The new address counts only after a restart.
        with pytest.raises(ValidationError, match="no keys are configured"):
            antares.gateway.reload(gateway_config(server={"host": "127.0.0.1"}))
        assert (await antares.ask()).status_code == 401


@pytest.mark.parametrize(
    ("text", "logged"),
    [
        ("classes: [\n", "line 2: not YAML"),
        ("classes: {chat: {ttft_ms: -1}}\n", "line 1: classes.chat.ttft_ms"),
        ("engines: []\nclasses: {a: {}}\ndefault_class: b\nkeys: {}\n", "line 4: keys"),
        ("", "must be a mapping"),
    ],
)
async def test_file_with_mistakes_changes_nothing_and_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str, logged: str
) -> None:
    file = tmp_path / "antares.yaml"
    file.write_text(text)
    async with live() as antares:
        before = antares.gateway.proxy.keys, antares.gateway.proxy.classes
        report = await Reloader(antares.gateway, lambda: load(file), file=file).reload()
        assert report["mistakes"]
        assert (antares.gateway.proxy.keys, antares.gateway.proxy.classes) == before
        assert logged in caplog.text
        assert "nothing changed" in caplog.text
        assert (await antares.ask()).status_code == 200


async def test_missing_file_changes_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with live() as antares:
        report = await Reloader(antares.gateway, lambda: load(tmp_path / "absent.yaml")).reload()
        assert not report["ok"]
        assert "cannot be read" in caplog.text
        assert (await antares.ask()).status_code == 200


async def test_reload_logs_what_changed_and_what_needs_a_restart(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with live() as antares:
        await Reloader(antares.gateway, lambda: gateway_config(policy={"name": "fcfs"}, server={"port": 9})).reload()
    assert "changed: policy" in caplog.text
    assert "needs a restart to take effect: server.port" in caplog.text


async def test_mistakes_that_only_the_process_finds_have_a_line(tmp_path: Path) -> None:
    file = tmp_path / "antares.yaml"
    engines = "engines:\n- {kind: simulated}\n- {kind: http, base_url: 'http://127.0.0.1:9', api_key_env: NOT_SET}\n"
    file.write_text(engines + "classes: {chat: {}}\ndefault_class: chat\npredictor: {enabled: false}\n")
    async with live() as antares:
        report = await Reloader(antares.gateway, lambda: load(file), file=file).reload()
        assert [(m["line"], m["key"]) for m in report["mistakes"]] == [(3, "engines[1]")]
        assert "NOT_SET" in report["mistakes"][0]["reason"]
        assert (await antares.ask(x_slo_class="free")).status_code == 200
    absent = tmp_path / "absent" / "traffic.jsonl"
    file.write_text(
        f"engines: [{{kind: simulated}}]\nclasses: {{chat: {{}}}}\ndefault_class: chat\nrecording: {{path: {absent}}}\n"
    )
    async with live() as antares:
        report = await Reloader(antares.gateway, lambda: load(file), file=file).reload()
        assert [(m["line"], m["key"]) for m in report["mistakes"]] == [(4, "recording.path")]
        assert "cannot open" in report["mistakes"][0]["reason"]
    async with live(server={"host": "0.0.0.0"}, keys=[key(ALICE, "alice")]) as antares:
        file.write_text("server: {port: 7}\n" + CONFIG.split("\n", 1)[1])
        report = await Reloader(antares.gateway, lambda: load(file), file=file).reload()
        assert [(m["line"], m["key"]) for m in report["mistakes"]] == [(1, "server.host")]
        assert "no keys are configured" in report["mistakes"][0]["reason"]


CONFIG = """\
server: {port: 0, drain_s: 5}
engines: [{kind: simulated, step_times: {d: 0.02}}]
predictor: {enabled: false}
default_class: chat
classes: {chat: {}}
"""


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGHUP")
async def test_sighup_reloads_without_dropping_a_stream(tmp_path: Path) -> None:
    async with served(tmp_path, CONFIG) as (process, http):
        body = chat(stream=True, max_tokens=60, ignore_eos=True)
        streaming = asyncio.create_task(http.post(CHAT, json=body))
        while "antares_ledger_open 1.0" not in (await http.get("/metrics")).text:
            await asyncio.sleep(0.01)
        (tmp_path / "antares.yaml").write_text("nonsense")
        process.send_signal(signal.SIGHUP)
        log = await until_said(process, "line 1: the file must be a mapping")
        assert (await http.post(CHAT, json=chat())).status_code == 200
        (tmp_path / "antares.yaml").write_text(f"{CONFIG}keys: [{{sha256: {hash_key(ALICE)}, tenant: a}}]\n")
        process.send_signal(signal.SIGHUP)
        async with asyncio.timeout(HANG_S):
            while (await http.post(CHAT, json=chat(max_tokens=1))).status_code != 401:
                await asyncio.sleep(0.02)
        answer = await http.post(CHAT, json=chat(max_tokens=1), headers={"authorization": f"Bearer {ALICE}"})
        assert answer.status_code == 200
        assert (await streaming).text.endswith("data: [DONE]\n\n")
        process.send_signal(signal.SIGTERM)
        assert process.stderr is not None
        log += (await process.stderr.read()).decode()
        assert await process.wait() == 0
        assert "changed: keys" in log
