"""Engines that reject, refuse connections or raise: the gateway recovers and leaves no request open."""

from __future__ import annotations

import asyncio
import gc

from engine_adapter.engine import ASGIApp, EngineUnreachable
from engine_adapter.simulated.engine import SimulatedEngine
from engine_adapter.step_time.linear_forms import StepTimes
from tests.fixtures.live_gateway import FAST, Live, live
from tests.fixtures.live_server import eventually


async def test_idle_engine_that_rejects_is_probed_and_serves_again(antares: Live) -> None:
    model = antares.engine.state.step_time
    model.start_over(StepTimes(d=10.0))  # as learned from a machine that was suspended
    rejected = await antares.ask()
    assert (rejected.status_code, rejected.json()["error"]["code"]) == (429, "tpot_unattainable")
    assert (await antares.ask()).status_code == 200


class UnreachableEngine(SimulatedEngine):
    """Refuses the first two requests."""

    calls = 0

    @property
    def app(self) -> ASGIApp:
        inner = super().app

        async def app(scope: object, receive: object, send: object) -> None:
            self.calls += 1
            if self.calls < 3:
                raise EngineUnreachable("not yet")
            await inner(scope, receive, send)  # type: ignore[arg-type]

        return app  # type: ignore[return-value]


async def test_request_is_queued_again_if_its_engine_is_unreachable() -> None:
    engine = UnreachableEngine(times=FAST, output_tokens=8)
    async with live(engine) as antares:
        assert (await antares.ask()).status_code == 200
        await eventually(antares.is_idle)
        assert engine.calls == 3
        assert antares.outcomes["finished"] == 1


class RaisesOnDisconnect(SimulatedEngine):
    """Raises when the client disconnects."""

    @property
    def app(self) -> ASGIApp:
        async def app(scope: object, receive: object, send: object) -> None:
            await receive()  # type: ignore[operator]
            await receive()  # type: ignore[operator]
            raise RuntimeError("raised after the client disconnected")

        return app  # type: ignore[return-value]


async def test_engine_error_after_a_disconnect_is_handled() -> None:
    unhandled: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: unhandled.append(context["message"]))
    async with live(RaisesOnDisconnect(times=FAST, output_tokens=8)) as antares:
        task = asyncio.create_task(antares.ask())
        await eventually(lambda: antares.gateway.engine_queues[0].running)
        task.cancel()
        await eventually(antares.is_idle)
        assert antares.outcomes["cancelled"] == 1
    gc.collect()  # an exception that was never retrieved is reported when its task is collected
    assert unhandled == []
