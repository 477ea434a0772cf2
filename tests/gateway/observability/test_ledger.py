"""Each accepted request is closed once, with exactly one outcome."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from engine_adapter.engine import Message, Receive, Scope, Send
from engine_adapter.simulated.engine import SimulatedEngine
from engine_adapter.step_time.linear_forms import StepTimes
from gateway.api import response_relay as relay
from gateway.api import scheduled
from gateway.observability.ledger import OUTCOMES, Entry, Ledger, LedgerError, Outcome
from gateway.requests.request import Request
from gateway.requests.slo import Slo
from tests.fixtures.live_gateway import CHAT, TEXT, Live, chat, fast_engine, live
from tests.fixtures.live_server import eventually


def request(slo: Slo | None = None) -> Request:
    return Request("r", "chat", 0.0, slo or Slo(), 10, 10.0)


class LedgerMachine(RuleBasedStateMachine):
    open_entries = Bundle("open")
    closed_entries = Bundle("closed")

    def __init__(self) -> None:
        super().__init__()
        self.reported: list[Entry] = []
        self.ledger = Ledger(on_close=self.reported.append)
        self.still_open = 0

    @rule(target=open_entries)
    def accept(self) -> Entry:
        self.still_open += 1
        return self.ledger.open(request())

    @rule(target=closed_entries, entry=consumes(open_entries), outcome=st.sampled_from(OUTCOMES))
    def close(self, entry: Entry, outcome: Outcome) -> Entry:
        self.ledger.close(entry, outcome)
        self.still_open -= 1
        return entry

    @rule(entry=closed_entries, outcome=st.sampled_from(OUTCOMES))
    def close_again(self, entry: Entry, outcome: Outcome) -> None:
        with pytest.raises(LedgerError):
            self.ledger.close(entry, outcome)

    @invariant()
    def balances(self) -> None:
        assert self.ledger.open_count == self.still_open
        assert self.ledger.accepted == self.ledger.closed.total() + self.still_open
        assert len(self.reported) == self.ledger.closed.total()


TestLedger = LedgerMachine.TestCase
TestLedger.settings = settings(max_examples=30, stateful_step_count=20, deadline=None)


@pytest.mark.parametrize(
    ("ttft", "tpot", "e2e", "violated"),
    [
        (0.1, 0.01, 1.0, ()),
        (0.1001, 0.01, 1.0, ("ttft",)),
        (None, 0.01, 1.0, ("ttft",)),
        (0.1, 0.0101, 1.01, ("tpot", "e2e")),
    ],
)
def test_close_counts_as_attained_only_if_every_bound_is_met(
    ttft: float | None, tpot: float, e2e: float, violated: tuple[str, ...]
) -> None:
    ledger = Ledger()
    entry = ledger.open(request(Slo(0.1, 0.01, 1.0)))
    entry.ttft_s, entry.tpot_s, entry.e2e_s = ttft, tpot, e2e
    ledger.close(entry, "finished")
    assert (entry.violated, entry.attained, ledger.attained) == (violated, not violated, int(not violated))


@pytest.mark.parametrize("outcome", ["rejected", "failed", "cancelled"])
def test_close_does_not_count_unfinished_requests_as_attained(outcome: Outcome) -> None:
    ledger = Ledger()
    entry = ledger.open(request())
    ledger.close(entry, outcome, "reason")
    assert not entry.attained
    assert ledger.attained == 0


async def test_gateway_closes_requests_with_every_outcome() -> None:
    async with live(fast_engine(times=StepTimes(d=5e-3), restart_s=0.05)) as antares:
        await antares.ask()
        await antares.ask(x_slo_ttft_ms="1")
        await antares.hang_up_after(2)
        await eventually(antares.is_idle)
        dying = asyncio.create_task(antares.ask())
        await eventually(lambda: antares.engine.state.engine_running == 1)
        antares.engine.crash()
        await dying
        await eventually(antares.is_idle)
        assert antares.outcomes == {"finished": 1, "rejected": 1, "failed": 1, "cancelled": 1}


def pending_tasks() -> set[asyncio.Task[object]]:
    """Return all unfinished tasks except the test's own and the engine's."""
    pending = {task for task in asyncio.all_tasks() if not task.done()}
    return {t for t in pending if t is not asyncio.current_task() and not t.get_name().startswith("simulated")}


async def test_gateway_leaks_nothing_when_half_of_64_clients_disconnect() -> None:
    async with live(fast_engine(times=StepTimes(d=2e-3), output_tokens=40)) as antares:
        before = pending_tasks()
        for repetition in (1, 2):
            complete = [antares.ask(chat(f"story {i}", stream=True)) for i in range(32)]
            disconnecting = [antares.hang_up_after(1 + i % 5, f"tale {i}") for i in range(32)]
            answers = await asyncio.gather(*complete, *disconnecting)
            await eventually(antares.is_idle)
            assert all(answer.text.endswith("data: [DONE]\n\n") for answer in answers[:32] if answer)
            assert antares.outcomes == {
                "finished": 32 * repetition, "rejected": 0, "failed": 0, "cancelled": 32 * repetition,
            }  # fmt: skip
        await eventually(lambda: not pending_tasks() - before)


async def test_cancellation_at_admission_removes_the_request_from_its_queue(antares: Live) -> None:
    engine_queue = antares.gateway.engine_queues[0]
    call = asyncio.create_task(call_directly(antares))
    while not engine_queue.running:
        await asyncio.sleep(0)
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    await eventually(antares.is_idle)
    assert antares.outcomes["cancelled"] == 1


async def test_disconnect_after_done_counts_as_finished(antares: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduled, "LEAVE_GRACE_S", 0.05)
    break_engine_after(monkeypatch, antares, b"data: [DONE]", hang=True)
    async with antares.http.stream("POST", CHAT, json=chat(stream=True)) as response:
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                break
    await eventually(antares.is_idle)
    assert antares.outcomes["finished"] == antares.gateway.ledger.attained == 1


async def test_engine_error_after_done_counts_as_finished(antares: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    break_engine_after(monkeypatch, antares, b"data: [DONE]")
    assert (await antares.ask(chat(stream=True))).text.endswith("data: [DONE]\n\n")
    await eventually(antares.is_idle)
    assert antares.outcomes["finished"] == 1


def break_engine_after(monkeypatch: pytest.MonkeyPatch, antares: Live, last: bytes, *, hang: bool = False) -> None:
    """Make the engine hang, or raise an error, after it has sent ``last``."""
    inner = antares.engine.app

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_up_to_last(message: Message) -> None:
            await send(message)
            if last in message.get("body", b""):
                if hang:
                    await asyncio.Event().wait()
                raise ConnectionError

        await inner(scope, receive, send_up_to_last)

    monkeypatch.setattr(SimulatedEngine, "app", property(lambda engine: app))


async def test_client_that_stops_reading_is_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduled, "LEAVE_GRACE_S", 0.05)

    async def stop_reading(message: Message) -> None:
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    async with live(limits={"stall_s": 0.1}) as antares:
        await call_directly(antares, b'{"prompt": "hi", "stream": true}', stop_reading)
        await eventually(antares.is_idle)
        assert antares.outcomes["cancelled"] == 1


@pytest.mark.parametrize("outcome", ["finished", "failed"])
async def test_client_that_does_not_read_the_end_keeps_the_outcome(
    monkeypatch: pytest.MonkeyPatch, outcome: str
) -> None:
    monkeypatch.setattr(relay, "LAST_WORDS_S", 0.05)
    monkeypatch.setattr(scheduled, "LEAVE_GRACE_S", 0.05)
    last_read = b"data: [DONE]" if outcome == "finished" else b'"role":'
    stopped = False

    async def stop_reading(message: Message) -> None:
        nonlocal stopped
        if stopped:
            await asyncio.Event().wait()
        stopped = last_read in message.get("body", b"")

    async with live() as antares:
        break_engine_after(monkeypatch, antares, last_read)
        await call_directly(antares, b'{"messages": [{"role": "user", "content": "hi"}], "stream": true}', stop_reading)
        await eventually(antares.is_idle)
        assert antares.outcomes[outcome] == 1


async def test_client_that_reads_slowly_finishes() -> None:
    async def read_slowly(message: Message) -> None:
        if message["type"] == "http.response.body":
            await asyncio.sleep(0.04)

    async with live(limits={"stall_s": 2}) as antares:
        await call_directly(antares, b'{"prompt": "hi", "stream": true}', read_slowly)
        assert antares.outcomes["finished"] == 1


async def read_nothing(message: Message) -> None:
    pass


async def call_directly(antares: Live, body: bytes = b'{"prompt": "hi"}', send: Send = read_nothing) -> None:
    """Call the gateway without a server, so that a test can cancel between two iterations of the event loop."""
    unread = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> dict[str, object]:
        if unread:
            return unread.pop()
        await asyncio.Event().wait()
        raise AssertionError

    path = CHAT if b"messages" in body else TEXT
    scope = {"type": "http", "method": "POST", "path": path, "headers": []}
    await antares.gateway(scope, receive, send)
