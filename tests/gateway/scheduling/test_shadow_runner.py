"""Shadow policies in a serving gateway: what they report, and that they never affect live requests."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from engine_adapter.step_time.linear_forms import StepTimes
from gateway.config.file import load
from gateway.config.mistakes import ConfigError
from gateway.policies.base import Decision
from gateway.policies.fcfs import Fcfs
from gateway.policies.registry import POLICIES
from gateway.scheduling import shadow_runner
from gateway.scheduling.shadow import Shadow
from tests.fixtures.live_gateway import Live, chat, fast_engine, live
from tests.fixtures.live_server import eventually

SLOW = StepTimes(b=1e-6, d=0.02, alpha=1e-6)


def shadows(antares: Live) -> dict[str, Shadow]:
    return {shadow.name: shadow for shadow in antares.gateway.engine_queues[0].shadows.all}


def is_idle(antares: Live) -> bool:
    """No request waits or runs in the gateway or in a shadow."""
    return antares.is_idle() and not any(shadow.waiting or shadow.running for shadow in shadows(antares).values())


async def samples(antares: Live, metric: str, *labels: str) -> dict[tuple[str, ...], float]:
    """The values of ``metric`` on /metrics, by the values of ``labels``."""
    text = (await antares.http.get("/metrics")).text
    return {
        tuple(sample.labels[label] for label in labels): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == metric
    }


async def test_metrics_count_shadow_rejections_of_admitted_requests() -> None:
    async with live(fast_engine(times=SLOW), policy={"name": "fcfs"}, shadow=["mooncake", "s3"]) as antares:
        answers = [await antares.ask(x_slo_tpot_ms=bound) for bound in ("1000", "1", "1")]
        await eventually(lambda: is_idle(antares))
        assert [answer.status_code for answer in answers] == [200, 200, 200]
        assert antares.outcomes["finished"] == 3
        requests = await samples(antares, "antares_shadow_requests_total", "policy", "slo_class", "outcome", "reason")
        assert requests == {
            ("mooncake", "chat", "admitted", ""): 1,
            ("mooncake", "chat", "rejected", "tpot_unattainable"): 2,
            ("s3", "chat", "admitted", ""): 3,
        }
        agreement = await samples(antares, "antares_shadow_agreement_total", "policy", "active", "shadow")
        assert agreement["mooncake", "admitted", "admitted"] == 1
        assert agreement["mooncake", "admitted", "rejected"] == 2
        assert agreement["s3", "admitted", "admitted"] == 3
        assert agreement["s3", "rejected", "admitted"] == 0
        assert await samples(antares, "antares_shadow_up", "policy", "engine") == {
            ("mooncake", "simulated"): 1,
            ("s3", "simulated"): 1,
        }
        spent = await samples(antares, "antares_shadow_seconds_total", "policy")
        assert spent["mooncake",] > 0


async def test_shadow_counts_admissions_of_rejected_requests() -> None:
    async with live(fast_engine(times=SLOW), policy={"name": "scorpio"}, shadow=["fcfs"]) as antares:
        answers = [await antares.ask(x_slo_tpot_ms="1") for _ in range(3)]
        assert [answer.status_code for answer in answers] == [429, 429, 429]
        await eventually(lambda: is_idle(antares))
        assert shadows(antares)["fcfs"].outcomes == {("chat", "admitted", ""): 3}
        assert shadows(antares)["fcfs"].agreement == {("rejected", "admitted"): 3}


async def test_shadow_forgets_the_request_of_a_disconnected_client() -> None:
    async with live(shadow=["fcfs"]) as antares:
        await antares.hang_up_after(2)
        await eventually(lambda: is_idle(antares))
        assert shadows(antares)["fcfs"].outcomes == {("chat", "admitted", ""): 1}


async def test_shadow_continues_after_an_engine_crash() -> None:
    async with live(fast_engine(times=SLOW, output_tokens=500), shadow=["fcfs"]) as antares:
        task = asyncio.create_task(antares.ask())
        await eventually(lambda: shadows(antares)["fcfs"].running and antares.engine.state.engine_running)
        antares.engine.crash()
        assert (await task).status_code == 503
        assert shadows(antares)["fcfs"].running == 0
        await eventually(lambda: antares.engine.state.alive)
        assert (await antares.ask(chat(max_tokens=2))).status_code == 200
        await eventually(lambda: is_idle(antares))
        assert shadows(antares)["fcfs"].outcomes == {("chat", "admitted", ""): 2}


@dataclass
class BrokenPolicy(Fcfs):
    """Decides once, then raises."""

    name: str = "broken"
    calls: int = 0

    def decide(self, *args: Any) -> Decision:
        self.calls += 1
        if self.calls > 1:
            raise RuntimeError("a bug")
        return super().decide(*args)


async def test_failing_shadow_is_disabled_and_affects_no_other(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(POLICIES, "broken", (BrokenPolicy, {}))  # type: ignore[arg-type]
    async with live(shadow=["broken", "s3"]) as antares:
        for _ in range(4):
            assert (await antares.ask()).status_code == 200
            await eventually(lambda: not shadows(antares)["s3"].waiting)
        await eventually(lambda: is_idle(antares))
        broken = shadows(antares)["broken"]
        assert not broken.up
        assert (broken.waiting, broken.outcomes) == (0, {("chat", "admitted", ""): 1})
        assert shadows(antares)["s3"].outcomes == {("chat", "admitted", ""): 4}
        assert (await samples(antares, "antares_shadow_up", "policy"))["broken",] == 0
        records = [record for record in caplog.records if record.name == "antares.shadow"]
        assert [(record.levelno, record.getMessage()) for record in records] == [
            (logging.ERROR, "shadow policy broken is disabled: it raised RuntimeError")
        ]


async def test_slow_shadow_is_disabled(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(shadow_runner, "SLOW_UPDATE_S", 0.0)
    async with live(shadow=["fcfs"]) as antares:
        for _ in range(3 * shadow_runner.MAX_SLOW_UPDATES):
            assert (await antares.ask(chat(max_tokens=1))).status_code == 200
            await eventually(lambda: not shadows(antares)["fcfs"].waiting)
        assert shadows(antares)["fcfs"].updates == shadow_runner.MAX_SLOW_UPDATES
        assert not shadows(antares)["fcfs"].up
        assert "took more than" in caplog.text


async def test_shadow_updates_keep_to_their_time_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shadow_runner, "MAX_TIME_SHARE", 1e-12)
    async with live(shadow=["fcfs"]) as antares:
        for _ in range(5):
            assert (await antares.ask()).status_code == 200
            await asyncio.sleep(2 * shadow_runner.MIN_INTERVAL_S)
        assert shadows(antares)["fcfs"].updates == 1, "the next update is years away"
        assert antares.is_idle()


# --- configuration ----------------------------------------------------------------------------------------------------

BASE = """engines: [{kind: simulated}]
classes: {chat: {ttft_ms: 500}}
default_class: chat
"""


def config_file(folder: Path, text: str) -> Path:
    file = folder / "antares.yaml"
    file.write_text(BASE + text)
    return file


def test_config_reads_shadow_policies_with_options_and_labels(tmp_path: Path) -> None:
    text = "shadow:\n- fcfs\n- {name: scorpio, options: {eta: 1.1}}\n- {name: scorpio, label: strict}\n"
    config = load(config_file(tmp_path, text), env={})
    policies = config.shadow_policies()
    assert list(policies) == ["fcfs", "scorpio", "strict"]
    assert [getattr(policies[name], "eta", None) for name in policies] == [None, 1.1, 1.3]
    assert policies["fcfs"] is not config.shadow_policies()["fcfs"], "each engine has its own instances"


@pytest.mark.parametrize(
    ("text", "line", "key", "reason"),
    [
        ("shadow: [fcfs, none]\n", 4, "shadow[1]", "no policy is called 'none'"),
        ("shadow:\n- {name: scorpio, options: {eta: -1}}\n", 5, "shadow[0]", "eta must be a number"),
        ("shadow:\n- fcfs\n- {name: fcfs}\n", 6, "shadow[1]", "a label of its own"),
        ("shadow:\n- {name: fcfs, label: 'a b'}\n", 5, "shadow[0].label", "pattern"),
        ("shadow: fcfs\n", 4, "shadow", "list"),
    ],
)
def test_config_error_names_the_line_of_a_wrong_shadow(
    tmp_path: Path, text: str, line: int, key: str, reason: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load(config_file(tmp_path, text), env={})
    (mistake,) = caught.value.mistakes
    assert (mistake.line, mistake.key) == (line, key)
    assert reason in mistake.reason
