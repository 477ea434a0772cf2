"""Several engines behind one gateway; and a gateway's whole life as a process."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from engine_adapter.engine import EngineUnreachable
from engine_adapter.simulated.engine import SimulatedEngine
from engine_adapter.step_time.linear_forms import StepTimes
from gateway.app import Gateway
from gateway.policies.base import Decision
from tests.fixtures.live_gateway import CHAT, Live, chat, eventually, fast_engine, gateway_config, live, serving


class HoldEverything:
    """A policy that admits nothing."""

    name, gate = "hold", "open"

    def decide(self, now: float, waiting: object, running: object, engine: object) -> Decision:
        return Decision()


@asynccontextmanager
async def two_engines(**changes: object) -> AsyncIterator[tuple[Gateway, list[SimulatedEngine], httpx.AsyncClient]]:
    engines = [fast_engine(name=name, **changes) for name in ("left", "right")]
    gateway = Gateway(gateway_config(), list(engines))
    await gateway.start()
    async with serving(gateway) as url, httpx.AsyncClient(base_url=url, verify=False) as http:
        yield gateway, engines, http
    await gateway.stop()
    await gateway.stop()


async def test_requests_spread_over_engines_by_the_work_they_have() -> None:
    async with two_engines(times=StepTimes(d=0.01)) as (gateway, _, http):
        asking = [asyncio.create_task(http.post(CHAT, json=chat())) for _ in range(8)]
        await eventually(lambda: sum(len(engine_queue.running) for engine_queue in gateway.engine_queues) == 8)
        assert [len(engine_queue.running) for engine_queue in gateway.engine_queues] == [4, 4]
        assert {(await task).status_code for task in asking} == {200}


async def test_a_dead_engine_gets_nothing_while_another_lives() -> None:
    async with two_engines(restart_s=30) as (_, engines, http):
        engines[0].crash()
        answers = [await http.post(CHAT, json=chat(), headers={"x-slo-report": "1"}) for _ in range(3)]
        assert {answer.json()["antares"]["engine"] for answer in answers} == {"right"}
        assert (await http.get("/ready")).status_code == 200
        assert (await http.get("/v1/models")).status_code == 200


async def test_what_waits_for_a_dead_engine_moves_to_one_that_lives() -> None:
    async with two_engines(restart_s=30) as (gateway, engines, http):
        left = gateway.engine_queues[0]
        left.admission.policy = HoldEverything()
        asking = asyncio.create_task(http.post(CHAT, json=chat(), headers={"x-slo-report": "1"}))
        await eventually(lambda: len(left.waiting) == 1)
        engines[0].crash()
        answer = await asking
        assert (answer.status_code, answer.json()["antares"]["engine"]) == (200, "right")
        await eventually(lambda: gateway.ledger.open_count == 0)


async def test_an_idle_engine_that_refuses_everything_is_probed_and_serves_again(antares: Live) -> None:
    model = antares.engine.state.step_time
    model.start_over(StepTimes(d=10.0))  # what it would have learnt from a machine that stood still
    refused = await antares.ask()
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "tpot_unattainable")
    assert (await antares.ask()).status_code == 200


async def test_a_request_that_its_engine_never_took_is_queued_again(antares: Live) -> None:
    inner, tries = antares.engine.app, [0]

    async def twice_unreachable(scope: object, receive: object, send: object) -> None:
        tries[0] += 1
        if tries[0] < 3:
            raise EngineUnreachable("not yet")
        await inner(scope, receive, send)  # type: ignore[arg-type]

    antares.engine._app = twice_unreachable  # type: ignore[assignment]
    assert (await antares.ask()).status_code == 200
    await eventually(antares.is_idle)
    assert tries == [3]
    assert antares.outcomes["finished"] == 1
    assert antares.is_idle()


async def test_an_engine_that_fails_as_its_client_leaves_is_no_unheard_exception() -> None:
    unheard: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: unheard.append(context["message"]))

    async def fails_when_left(scope: object, receive: object, send: object) -> None:
        await receive()  # type: ignore[operator]
        await receive()  # type: ignore[operator]
        raise RuntimeError("nobody listens")

    async with live() as antares:
        antares.engine._app = fails_when_left  # type: ignore[assignment]
        asking = asyncio.create_task(antares.ask())
        await eventually(lambda: antares.gateway.engine_queues[0].running)
        asking.cancel()
        await eventually(antares.is_idle)
        assert antares.outcomes["cancelled"] == 1
    import gc

    gc.collect()
    assert unheard == []


async def test_a_drain_that_takes_too_long_says_so() -> None:
    async with live(fast_engine(times=StepTimes(d=0.05))) as antares:
        asking = asyncio.create_task(antares.ask())
        await eventually(lambda: antares.gateway.ledger.open_count == 1)
        assert not await antares.gateway.drain(0.05)
        asking.cancel()
        await eventually(antares.is_idle)


CONFIG = """\
server: {port: 0, drain_s: 5}
engines: [{kind: simulated, step_times: {d: 0.05}}]
predictor: {enabled: false}
classes: {chat: {}}
default_class: chat
"""


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGTERM")
async def test_the_served_process_answers_drains_on_sigterm_and_exits_0(tmp_path: Path) -> None:
    (tmp_path / "antares.yaml").write_text(CONFIG)
    command = ("-m", "gateway.cli", "serve", "-c", str(tmp_path / "antares.yaml"))
    code = "import sys; sys.argv[0] = 'antares'; from gateway.cli import main; main()"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, *command[2:], stderr=asyncio.subprocess.PIPE, env={**os.environ, "COLUMNS": "200"}
    )
    assert process.stderr is not None
    try:
        async with asyncio.timeout(15):
            while not (found := re.search(rb"is ready at (http://\S+)", await process.stderr.readline())):
                assert process.returncode is None
            async with httpx.AsyncClient(base_url=found[1].decode(), verify=False, timeout=10) as http:
                asking = asyncio.create_task(http.post(CHAT, json=chat(max_tokens=8, ignore_eos=True)))
                while "antares_ledger_open 1.0" not in (await http.get("/metrics")).text:
                    await asyncio.sleep(0.01)
                process.send_signal(signal.SIGTERM)
                assert (await asking).status_code == 200
            await process.stderr.read()
            assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
