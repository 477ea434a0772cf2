"""Every accepted request ends once, in exactly one way."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from engine_adapter.engine import Message, Receive, Scope, Send
from engine_adapter.step_time.linear_forms import StepTimes
from gateway.api import proxy
from gateway.api import response_relay as relay
from gateway.observability.ledger import OUTCOMES, Entry, Ledger, LedgerError, Outcome
from gateway.requests.request import Request
from gateway.requests.slo import Slo
from tests.fixtures.live_gateway import CHAT, TEXT, Live, chat, eventually, fast_engine, live


def request(slo: Slo | None = None) -> Request:
    return Request("r", "chat", 0.0, slo or Slo(), 10, 10.0)


class LedgerMachine(RuleBasedStateMachine):
    open_entries = Bundle("open")
    closed_entries = Bundle("closed")

    def __init__(self) -> None:
        super().__init__()
        self.told: list[Entry] = []
        self.ledger = Ledger(on_close=self.told.append)
        self.still_open = 0

    @rule(target=open_entries)
    def accept(self) -> Entry:
        self.still_open += 1
        return self.ledger.open(request())

    @rule(target=closed_entries, entry=consumes(open_entries), outcome=st.sampled_from(OUTCOMES))
    def end(self, entry: Entry, outcome: Outcome) -> Entry:
        self.ledger.close(entry, outcome)
        self.still_open -= 1
        return entry

    @rule(entry=closed_entries, outcome=st.sampled_from(OUTCOMES))
    def end_again(self, entry: Entry, outcome: Outcome) -> None:
        with pytest.raises(LedgerError):
            self.ledger.close(entry, outcome)

    @invariant()
    def balances(self) -> None:
        assert self.ledger.open_count == self.still_open
        assert self.ledger.accepted == self.ledger.closed.total() + self.still_open
        assert len(self.told) == self.ledger.closed.total()


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
def test_a_finished_request_attains_only_with_every_bound_met(
    ttft: float | None, tpot: float, e2e: float, violated: tuple[str, ...]
) -> None:
    ledger = Ledger()
    entry = ledger.open(request(Slo(0.1, 0.01, 1.0)))
    entry.ttft_s, entry.tpot_s, entry.e2e_s = ttft, tpot, e2e
    ledger.close(entry, "finished")
    assert (entry.violated, entry.attained, ledger.attained) == (violated, not violated, int(not violated))


@pytest.mark.parametrize("outcome", ["rejected", "failed", "cancelled"])
def test_what_did_not_finish_has_not_attained(outcome: Outcome) -> None:
    ledger = Ledger()
    entry = ledger.open(request())
    ledger.close(entry, outcome, "why")
    assert not entry.attained
    assert ledger.attained == 0


async def test_every_outcome_is_reached_over_http() -> None:
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


def our_tasks() -> set[asyncio.Task[object]]:
    """Tasks that serve requests: not the test's, the engine's own, or the HTTP client's."""
    mine = {task for task in asyncio.all_tasks() if not task.done()}
    return {t for t in mine if t is not asyncio.current_task() and not t.get_name().startswith("simulated")}


async def test_half_the_clients_of_64_streams_hang_up_and_nothing_is_left_behind() -> None:
    async with live(fast_engine(times=StepTimes(d=2e-3), output_tokens=40)) as antares:
        before = our_tasks()
        for turn in (1, 2):
            patient = [antares.ask(chat(f"story {i}", stream=True)) for i in range(32)]
            leaving = [antares.hang_up_after(1 + i % 5, f"tale {i}") for i in range(32)]
            answers = await asyncio.gather(*patient, *leaving)
            await eventually(antares.is_idle, within_s=2.0)
            assert all(answer.text.endswith("data: [DONE]\n\n") for answer in answers[:32] if answer)
            assert antares.outcomes == {"finished": 32 * turn, "rejected": 0, "failed": 0, "cancelled": 32 * turn}
        await eventually(lambda: len(our_tasks() - before) == 0)


async def test_a_call_cancelled_just_as_it_is_admitted_leaves_the_lane(antares: Live) -> None:
    engine_queue = antares.gateway.engine_queues[0]
    asking = asyncio.create_task(call_directly(antares))
    while not engine_queue.running:
        await asyncio.sleep(0)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    await eventually(antares.is_idle)
    assert antares.outcomes["cancelled"] == 1


async def test_a_client_that_hangs_up_at_done_was_served_though_the_engine_has_not_ended(
    antares: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proxy, "LEAVE_GRACE_S", 0.05)
    breaks_after(antares, b"data: [DONE]", asyncio.Event())
    async with antares.http.stream("POST", CHAT, json=chat(stream=True)) as response:
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                break
    await eventually(antares.is_idle)
    assert antares.outcomes["finished"] == antares.gateway.ledger.attained == 1


async def test_an_engine_that_breaks_after_done_broke_nothing(antares: Live) -> None:
    over = asyncio.Event()
    over.set()
    breaks_after(antares, b"data: [DONE]", over)
    assert (await antares.ask(chat(stream=True))).text.endswith("data: [DONE]\n\n")
    await eventually(antares.is_idle)
    assert antares.outcomes["finished"] == 1


def breaks_after(antares: Live, last: bytes, over: asyncio.Event) -> None:
    """The engine's app sends nothing after ``last``, and breaks when ``over`` is set."""
    inner = antares.engine._app

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_up_to_last(message: Message) -> None:
            await send(message)
            if last in message.get("body", b""):
                await over.wait()
                raise ConnectionError

        await inner(scope, receive, send_up_to_last)

    antares.engine._app = app  # type: ignore[assignment]


async def test_a_client_that_stops_reading_frees_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxy, "STALL_S", 0.05)
    monkeypatch.setattr(proxy, "LEAVE_GRACE_S", 0.05)

    async def stop_reading(message: Message) -> None:
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    async with live() as antares:
        await call_directly(antares, b'{"prompt": "hi", "stream": true}', stop_reading)
        await eventually(antares.is_idle)
        assert antares.outcomes["cancelled"] == 1


@pytest.mark.parametrize("outcome", ["finished", "failed"])
async def test_a_client_that_does_not_take_the_end_frees_its_place(
    monkeypatch: pytest.MonkeyPatch, outcome: str
) -> None:
    monkeypatch.setattr(relay, "LAST_WORDS_S", 0.05)
    monkeypatch.setattr(proxy, "LEAVE_GRACE_S", 0.05)
    last_taken = b"data: [DONE]" if outcome == "finished" else b'"role":'
    stopped = False

    async def stop_reading(message: Message) -> None:
        nonlocal stopped
        if stopped:
            await asyncio.Event().wait()
        stopped = last_taken in message.get("body", b"")

    async with live() as antares:
        over = asyncio.Event()
        over.set()
        breaks_after(antares, last_taken, over)
        await call_directly(antares, b'{"messages": [{"role": "user", "content": "hi"}], "stream": true}', stop_reading)
        await eventually(antares.is_idle)
        assert antares.outcomes[outcome] == 1


async def test_a_client_that_reads_slowly_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxy, "STALL_S", 0.05)

    async def read_slowly(message: Message) -> None:
        if message["type"] == "http.response.body":
            await asyncio.sleep(0.04)

    async with live() as antares:
        await call_directly(antares, b'{"prompt": "hi", "stream": true}', read_slowly)
        assert antares.outcomes["finished"] == 1


async def read_nothing(message: Message) -> None:
    pass


async def call_directly(antares: Live, body: bytes = b'{"prompt": "hi"}', send: Send = read_nothing) -> None:
    """A request without a server in between, so that it can be cancelled between two turns of the loop."""
    unread = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> dict[str, object]:
        if unread:
            return unread.pop()
        await asyncio.Event().wait()
        raise AssertionError

    path = CHAT if b"messages" in body else TEXT
    scope = {"type": "http", "method": "POST", "path": path, "headers": []}
    await antares.gateway(scope, receive, send)
