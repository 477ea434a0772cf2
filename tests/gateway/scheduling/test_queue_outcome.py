"""Requests that leave a queue together are answered in turn."""

from __future__ import annotations

import asyncio

from gateway.scheduling.queue_outcome import ANSWERS_AT_ONCE, Answers, Draining, QueueOutcome

Waiters = list[asyncio.Future[QueueOutcome]]


def waiters(count: int) -> Waiters:
    return [asyncio.get_running_loop().create_future() for _ in range(count)]


def done(futures: Waiters) -> int:
    return sum(future.done() for future in futures)


async def test_few_outcomes_are_set_at_once() -> None:
    answers, futures = Answers(), waiters(ANSWERS_AT_ONCE)
    for future in futures:
        answers.give(future, Draining())
    assert done(futures) == len(futures)


async def test_many_outcomes_are_spread_over_iterations_in_order() -> None:
    answers, futures = Answers(), waiters(3 * ANSWERS_AT_ONCE + 5)
    for future in futures:
        answers.give(future, Draining())
    for iteration in range(1, 4):
        assert done(futures) == iteration * ANSWERS_AT_ONCE
        assert all(future.done() for future in futures[: done(futures)])
        await asyncio.sleep(0)
    assert done(futures) == len(futures)


async def test_outcome_given_later_does_not_overtake() -> None:
    answers, futures = Answers(), waiters(2 * ANSWERS_AT_ONCE + 1)
    for future in futures[:-1]:
        answers.give(future, Draining())
    await asyncio.sleep(0)
    answers.give(futures[-1], Draining())
    assert not futures[-1].done()
    await asyncio.sleep(0)
    assert done(futures) == len(futures)


async def test_request_whose_client_left_meanwhile_is_skipped() -> None:
    answers, futures = Answers(), waiters(2 * ANSWERS_AT_ONCE)
    for future in futures:
        answers.give(future, Draining())
    for future in futures[ANSWERS_AT_ONCE:-1]:
        future.cancel()
    await asyncio.sleep(0)
    assert futures[-1].result() == Draining()


async def test_outcomes_are_set_at_once_again_after_a_pause() -> None:
    answers = Answers()
    for _ in range(3):
        futures = waiters(ANSWERS_AT_ONCE)
        for future in futures:
            answers.give(future, Draining())
        assert done(futures) == len(futures)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
