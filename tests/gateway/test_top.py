"""`antares top`: one frame of it, and how it reconnects."""

from __future__ import annotations

import asyncio
import io
import os
import pty
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from engine_adapter.engine import Receive, Scope, Send
from engine_adapter.simulated.engine import SimulatedEngine
from gateway import top
from gateway.observability import live as feed
from gateway.top import TopError, View, frame, run
from tests.fixtures.live_gateway import CLASSES, fast_engine, live
from tests.fixtures.live_server import HANG_S, serve
from tests.fixtures.ports import free_port

pytestmark = pytest.mark.process


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "INTERVAL_S", 0.05)


def console(width: int = 80, height: int = 24) -> Console:
    return Console(file=io.StringIO(), width=width, height=height, force_terminal=False)


def text_of(screen: Console) -> str:
    assert isinstance(screen.file, io.StringIO)
    return screen.file.getvalue()


async def test_once_prints_one_frame() -> None:
    async with live() as antares:
        await antares.ask()
        await antares.ask(x_slo_ttft_ms="1")
        screen = console()
        await run(antares.url, None, True, screen)
    text = text_of(screen)
    assert "adherence 50.0%" in text
    assert "chat: rejected, ttft_unattainable" in text
    assert "simulated" in text
    assert "alive" in text


async def snapshot_of(engines: int, classes: int) -> View:
    more = [SimulatedEngine(f"engine-{number}") for number in range(1, engines)]
    bounds = {f"class-{number}": {"ttft_ms": 1000 + number, "tpot_ms": 100} for number in range(classes)}
    async with live(more_engines=more, classes={**CLASSES, **bounds}) as antares:
        await asyncio.gather(*(antares.ask(x_slo_class=name) for name in bounds))
        async for view in top._views(antares.http):
            return view
    raise AssertionError


@pytest.mark.parametrize(("engines", "classes"), [(1, 1), (2, 4), (4, 6)])
async def test_frame_fits_the_terminal(engines: int, classes: int) -> None:
    view = await snapshot_of(engines, classes)
    for width, height in ((80, 24), (120, 40)):
        screen = console(width, height)
        screen.print(frame(view, width, height, ""))
        lines = text_of(screen).splitlines()
        assert len(lines) <= max(height, classes + engines + 14)
        assert max(map(len, lines)) <= width
        for number in range(classes):
            assert any(f"class-{number}" in line for line in lines)


async def test_names_are_shown_literally() -> None:
    engine = SimulatedEngine("simulated", "[bold]m[/nope]")
    async with live(engine) as antares:
        screen = console(width=120)
        await run(antares.url, None, True, screen)
    assert "[bold]m[/nope]" in text_of(screen)


async def test_once_says_that_no_gateway_is_reachable() -> None:
    with pytest.raises(TopError, match=r"not reachable: .+ Set --url"):
        await run(f"http://127.0.0.1:{free_port()}", None, True, console())


async def test_answer_of_another_server_is_an_error() -> None:
    async with live() as antares:
        with pytest.raises(TopError, match=r"answers 404\. Is --url a gateway"):
            await run(f"{antares.url}/v1", None, True, console())


async def test_page_that_is_no_feed_is_an_error() -> None:
    async def page(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/html")]})
        await send({"type": "http.response.body", "body": b"<html>"})

    async with serve(page) as url:
        with pytest.raises(TopError, match=r"no live feed\. Is --url a gateway"):
            await run(url, None, True, console())


async def test_url_that_is_none_is_an_error() -> None:
    with pytest.raises(TopError, match=r"is no URL: .+ Set --url"):
        await run("http://127.0.0.1:abc", None, True, console())


async def test_view_comes_back_after_a_restart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(top, "RETRY_S", 0.05)
    frames: list[str] = []

    class Screen:
        console = console()

        def update(self, shown: Any, refresh: bool) -> None:
            page = console()
            page.print(shown)
            frames.append(text_of(page))

    def seen(text: str) -> bool:
        return any(text in shown for shown in frames)

    async def wait_for(text: str) -> None:
        frames.clear()
        async with asyncio.timeout(HANG_S):
            while not seen(text):
                await asyncio.sleep(0.02)

    port = free_port()
    async with top.httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False) as http:
        showing = asyncio.create_task(top._show(http, Screen()))  # type: ignore[arg-type]
        await wait_for("reconnecting")
        async with live(port=port):
            await wait_for("live · q quits")
        await wait_for("reconnecting")
        assert seen("Antares")
        async with live(port=port):
            await wait_for("live · q quits")
        showing.cancel()
        await asyncio.gather(showing, return_exceptions=True)


async def in_terminal(url: str) -> AsyncIterator[tuple[asyncio.subprocess.Process, int]]:
    """Run `antares top` in a pseudo terminal of 80x24; yields the process and the terminal's descriptor."""
    ours, theirs = pty.openpty()
    code = "import sys; sys.argv[0] = 'antares'; from gateway.cli import main; main()"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, "top", "--url", url,
        stdin=theirs, stdout=theirs, stderr=theirs,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "80", "LINES": "24"}, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    os.close(theirs)
    try:
        yield process, ours
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        os.close(ours)


async def test_q_leaves_and_restores_the_terminal() -> None:
    async with live(fast_engine()) as antares:
        async for process, terminal in in_terminal(antares.url):
            output = b""
            loop = asyncio.get_running_loop()
            async with asyncio.timeout(HANG_S):
                while b"q quits" not in output:
                    output += await loop.run_in_executor(None, os.read, terminal, 65536)
                os.write(terminal, b"q")
                reading = loop.run_in_executor(None, os.read, terminal, 65536)
                assert await process.wait() == 0
                await reading
            assert b"\x1b[?1049h" in output
