"""Shadows beside a serving gateway: they decide nothing, show what they would have, and harm nobody."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from engine_adapter.step_time.linear_forms import StepTimes
from gateway.config.file import ConfigError, load
from gateway.policies.base import Decision
from gateway.policies.fcfs import Fcfs
from gateway.policies.registry import POLICIES
from gateway.scheduling import shadow_runner as shadows
from gateway.scheduling.shadow import Shadow
from tests.fixtures.live_gateway import Live, chat, eventually, fast_engine, live

SLOW = StepTimes(b=1e-6, d=0.02, alpha=1e-6)


def the(antares: Live, name: str) -> Shadow:
    return next(one for one in antares.gateway.engine_queues[0].shadows.all if one.name == name)


def settled(antares: Live) -> bool:
    """Nothing is under way, here or in any shadow's world."""
    shadowed = antares.gateway.engine_queues[0].shadows.all
    return antares.is_idle() and not any(one.waiting or one.running for one in shadowed)


async def counts(antares: Live, metric: str, *labels: str) -> dict[tuple[str, ...], float]:
    text = (await antares.http.get("/metrics")).text
    return {
        tuple(sample.labels[label] for label in labels): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == metric
    }


async def test_a_shadow_shows_what_it_would_reject_while_the_active_policy_serves_it() -> None:
    async with live(fast_engine(times=SLOW), policy={"name": "fcfs"}, shadow=["mooncake", "s3"]) as antares:
        answers = [await antares.ask(x_slo_tpot_ms=bound) for bound in ("1000", "1", "1")]
        await eventually(lambda: settled(antares))
        assert [answer.status_code for answer in answers] == [200, 200, 200]
        assert antares.outcomes["finished"] == 3
        shown = await counts(antares, "antares_shadow_requests_total", "policy", "slo_class", "outcome", "reason")
        assert shown == {
            ("mooncake", "chat", "admitted", ""): 1,
            ("mooncake", "chat", "rejected", "tpot_unattainable"): 2,
            ("s3", "chat", "admitted", ""): 3,
        }
        agree = await counts(antares, "antares_shadow_agreement_total", "policy", "active", "shadow")
        assert agree["mooncake", "admitted", "admitted"] == 1
        assert agree["mooncake", "admitted", "rejected"] == 2
        assert agree["s3", "admitted", "admitted"] == 3
        assert agree["s3", "rejected", "admitted"] == 0
        assert await counts(antares, "antares_shadow_up", "policy", "engine") == {
            ("mooncake", "simulated"): 1,
            ("s3", "simulated"): 1,
        }
        spent = await counts(antares, "antares_shadow_seconds_total", "policy")
        assert spent["mooncake",] > 0


async def test_a_shadow_shows_what_it_would_admit_while_the_active_policy_rejects_it() -> None:
    async with live(fast_engine(times=SLOW), policy={"name": "scorpio"}, shadow=["fcfs"]) as antares:
        answers = [await antares.ask(x_slo_tpot_ms="1") for _ in range(3)]
        assert [answer.status_code for answer in answers] == [429, 429, 429]
        await eventually(lambda: settled(antares))
        assert the(antares, "fcfs").outcomes == {("chat", "admitted", ""): 3}
        assert the(antares, "fcfs").agreement == {("rejected", "admitted"): 3}


async def test_a_client_that_leaves_leaves_the_shadows_too() -> None:
    async with live(shadow=["fcfs"]) as antares:
        await antares.hang_up_after(2)
        await eventually(lambda: settled(antares))
        assert the(antares, "fcfs").outcomes == {("chat", "admitted", ""): 1}


async def test_shadows_outlive_a_crash_of_the_engine() -> None:
    async with live(fast_engine(times=SLOW, output_tokens=500), shadow=["fcfs"]) as antares:
        dying = asyncio.create_task(antares.ask())
        await eventually(lambda: the(antares, "fcfs").running and antares.engine.state.engine_running)
        antares.engine.crash()
        assert (await dying).status_code == 503
        assert the(antares, "fcfs").running == 0
        await eventually(lambda: antares.engine.state.alive)
        assert (await antares.ask(chat(max_tokens=2))).status_code == 200
        await eventually(lambda: settled(antares))
        assert the(antares, "fcfs").outcomes == {("chat", "admitted", ""): 2}


@dataclass
class Broken(Fcfs):
    """Works once, then raises."""

    name: str = "broken"
    decided: list[float] = field(default_factory=list)

    def decide(self, now: float, *seen: Any) -> Decision:
        self.decided.append(now)
        if len(self.decided) > 1:
            raise RuntimeError("a bug")
        return super().decide(now, *seen)


async def test_a_shadow_that_fails_is_switched_off_and_nobody_else_notices(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(POLICIES, "broken", (Broken, {}))  # type: ignore[arg-type]
    async with live(shadow=["broken", "s3"]) as antares:
        for _ in range(4):
            assert (await antares.ask()).status_code == 200
            await eventually(lambda: not the(antares, "s3").waiting)
        await eventually(lambda: settled(antares))
        broken = the(antares, "broken")
        assert not broken.up
        assert (broken.waiting, broken.outcomes) == (0, {("chat", "admitted", ""): 1})
        assert the(antares, "s3").outcomes == {("chat", "admitted", ""): 4}
        assert (await counts(antares, "antares_shadow_up", "policy"))["broken",] == 0
        said = [record for record in caplog.records if record.name == "antares.shadow"]
        assert [(record.levelno, record.getMessage()) for record in said] == [
            (logging.ERROR, "shadow broken is switched off: it failed with RuntimeError")
        ]


async def test_a_shadow_that_holds_up_the_loop_again_and_again_is_switched_off(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(shadows, "SLOW_LOOK_S", 0.0)
    async with live(shadow=["fcfs"]) as antares:
        for _ in range(3 * shadows.SLOW_LOOKS):
            assert (await antares.ask(chat(max_tokens=1))).status_code == 200
            await eventually(lambda: not the(antares, "fcfs").waiting)
        assert the(antares, "fcfs").looks == shadows.SLOW_LOOKS
        assert not the(antares, "fcfs").up
        assert "took more than" in caplog.text


async def test_shadows_take_no_more_than_their_share_of_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shadows, "MOST_SHARE", 1e-12)
    async with live(shadow=["fcfs"]) as antares:
        for _ in range(5):
            assert (await antares.ask()).status_code == 200
            await asyncio.sleep(2 * shadows.LEAST_PAUSE_S)
        assert the(antares, "fcfs").looks == 1, "the next is years away"
        assert antares.is_idle()


# --- configuration ----------------------------------------------------------------------------------------------------

BASE = """engines: [{kind: simulated}]
classes: {chat: {ttft_ms: 500}}
default_class: chat
"""


def written(folder: Path, text: str) -> Path:
    file = folder / "antares.yaml"
    file.write_text(BASE + text)
    return file


def test_shadows_are_named_like_policies_with_options_and_a_label_if_need_be(tmp_path: Path) -> None:
    text = "shadow:\n- fcfs\n- {name: scorpio, options: {eta: 1.1}}\n- {name: scorpio, label: strict}\n"
    config = load(written(tmp_path, text), env={})
    policies = config.shadow_policies()
    assert list(policies) == ["fcfs", "scorpio", "strict"]
    assert [getattr(policies[name], "eta", None) for name in policies] == [None, 1.1, 1.3]
    assert policies["fcfs"] is not config.shadow_policies()["fcfs"], "each engine has its own"


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
def test_what_no_shadow_can_be_is_a_mistake_with_its_line(
    tmp_path: Path, text: str, line: int, key: str, reason: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load(written(tmp_path, text), env={})
    (mistake,) = caught.value.mistakes
    assert (mistake.line, mistake.key) == (line, key)
    assert reason in mistake.reason
