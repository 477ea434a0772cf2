"""The dashboard's page: what browsers may do with it, and in a real browser that it moves, reconnects and fits."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
from collections.abc import AsyncIterator

import httpx
import pytest

from engine_adapter.simulated.engine import SimulatedEngine
from engine_adapter.step_time.linear_forms import StepTimes
from gateway.api.auth import hash_key
from tests.fixtures.browser import CHROMIUM, BrowserPage, browser_page
from tests.fixtures.live_gateway import CLASSES, Live, Load, gateway_config, live
from tests.fixtures.ports import free_port

pytestmark = pytest.mark.process

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium found (Debian: apt-get install chromium)")

EVIL = "<img src=x onerror=alert(1)>"
"""A model name as an upstream server might send it."""


async def page_of(antares: Live) -> httpx.Response:
    response = await antares.http.get("/dashboard")
    assert response.status_code == 200
    return response


async def test_policy_allows_exactly_the_script_and_style_of_the_page(antares: Live) -> None:
    response = await page_of(antares)
    policy = dict(part.split(" ", 1) for part in response.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert policy["frame-ancestors"] == "'none'"
    for tag in ("script", "style"):
        (body,) = re.findall(rf"<{tag}>(.*?)</{tag}>", response.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
        assert policy[f"{tag}-src"] == f"'sha256-{digest}'"


async def test_page_is_self_contained(antares: Live) -> None:
    text = (await page_of(antares)).text
    assert re.findall(r"""(?:src|href)=["'](?!data:|#|metrics|status|docs)""", text) == []
    assert re.findall(r"https?://(?!www\.w3\.org/2000/svg)", text) == []
    # Neither inline handlers nor style attributes: the policy forbids them.
    assert re.findall(r"<[^>]+ (?:on\w+|style)=", text.split("<script>", maxsplit=1)[0]) == []
    assert "innerHTML" not in text


@pytest.fixture
async def page() -> AsyncIterator[BrowserPage]:
    async with browser_page() as opened:
        yield opened


class Traffic(Load):
    """Requests of three classes. One in four asks for a TTFT that cannot be met."""

    def __init__(self, antares: Live) -> None:
        self._antares = antares
        self._sent = 0

    async def ask(self) -> None:
        self._sent += 1
        headers = {"x_slo_class": ("chat", "tight", "free")[self._sent % 3]}
        if self._sent % 4 == 0:
            headers["x_slo_ttft_ms"] = "0.01"
        await self._antares.ask(**headers)


def engines() -> list[SimulatedEngine]:
    times = StepTimes(d=0.01, b=1e-4, alpha=1e-6)
    return [SimulatedEngine(f"sim-{name}", models=[EVIL], times=times, output_tokens=8) for name in "ab"]


ACCEPTED = "(feed.snapshot ? feed.snapshot.ledger.accepted : 0)"
LIVE = "document.getElementById('link').textContent === 'Live'"


FOCUSED = "(e => e.id || e.name || e.className || e.tagName)(document.activeElement)"


def numbers_of(part: str) -> str:
    return f"document.getElementById('{part}').textContent"


@needs_chromium
async def test_numbers_and_charts_move_under_load(page: BrowserPage) -> None:
    first, second = engines()
    async with live(first, more_engines=[second]) as antares, Traffic(antares):
        await page.open(f"{antares.url}/dashboard")
        await page.until(f"{LIVE} && {ACCEPTED} > 50")
        parts = (
            "verdict",
            "tiles",
            "classes",
            "goodput",
            "running",
            "why",
            "ttft",
            "tpot",
            "steps",
            "engines",
            "tenants",
        )
        before = [await page.evaluate(numbers_of(part)) for part in parts]
        path = await page.evaluate("document.querySelector('#goodput .trace').getAttribute('d')")
        await page.until(f"{ACCEPTED} > 400")
        await asyncio.sleep(0.5)
        after = [await page.evaluate(numbers_of(part)) for part in parts]
        assert await page.evaluate("document.querySelector('#goodput .trace').getAttribute('d')") != path
        assert before[0] != after[0]
        assert before[1] != after[1]
        assert "Rejected" in after[parts.index("why")]
        assert "first token would be late" in after[parts.index("why")]
        for chart in ("ttft", "tpot", "steps"):
            assert await page.evaluate(f"document.querySelectorAll('#{chart} svg circle').length") > 5
        # An upstream's model name is text.
        assert EVIL in after[parts.index("engines")]
        assert await page.evaluate("document.querySelectorAll('main img').length") == 0
        # Before the gateway stops, which breaks the stream.
        assert page.failures == []
    assert page.problems == []


@needs_chromium
async def test_page_shows_an_engine_that_starts_and_why_it_is_not_up(page: BrowserPage) -> None:
    added = {"kind": "http", "name": "gpu", "base_url": f"http://127.0.0.1:{free_port()}"}
    async with live() as antares:
        antares.gateway.reload(gateway_config(engines=[{"kind": "simulated"}, added]))
        await page.open(f"{antares.url}/dashboard")
        await page.until(f"{numbers_of('engines')}.includes('connection refused')")
        assert "gpu… starting" in await page.evaluate(numbers_of("engines"))
        antares.gateway.reload(gateway_config())
        await page.until(f"!{numbers_of('engines')}.includes('gpu')")
    assert page.problems == []


@needs_chromium
async def test_page_reconnects_after_the_gateway_restarts(page: BrowserPage) -> None:
    port = free_port()
    async with live(*engines()[:1], port=port) as antares:
        await antares.ask()
        await page.open(f"{antares.url}/dashboard")
        await page.until(f"{LIVE} && {ACCEPTED} === 1")
    await page.until("document.getElementById('link').textContent === 'Reconnecting'")
    samples = await page.evaluate("feed.samples.length")
    async with live(*engines()[:1], port=port) as antares:
        for _ in range(3):
            await antares.ask()
        await page.until(f"{LIVE} && {ACCEPTED} === 3")
        assert await page.evaluate("feed.samples.length") >= samples
    assert page.problems == []


@needs_chromium
async def test_page_fits_a_phone_and_has_a_dark_scheme(page: BrowserPage) -> None:
    first, second = engines()
    long_name = "a" * 60
    classes = {**CLASSES, long_name: {"ttft_ms": 0.01, "tpot_ms": 50, "e2e_ms": 100_000}}
    async with live(first, more_engines=[second], classes=classes) as antares, Traffic(antares):
        for _ in range(60):
            await antares.ask(x_slo_class=long_name)
        backgrounds = []
        for dark in (False, True):
            await page.open(f"{antares.url}/dashboard", width=360, height=740, dark=dark)
            await page.until(f"{LIVE} && {ACCEPTED} > 50")
            await asyncio.sleep(0.3)
            for details in ("waiting", "ttft", "curve"):
                await page.evaluate(f"document.querySelector('#{details} details').open = true")
            await page.until("document.querySelector('#curve table').rows.length > 2")
            assert await page.evaluate("document.documentElement.scrollWidth") == 360
            backgrounds.append(await page.evaluate("getComputedStyle(document.documentElement).backgroundColor"))
        assert backgrounds[0] != backgrounds[1]
        # The button overrides the system's scheme: auto, light, dark.
        await page.evaluate("document.getElementById('theme').click()")
        assert await page.evaluate("getComputedStyle(document.documentElement).backgroundColor") == backgrounds[0]
    assert page.problems == []


@needs_chromium
async def test_page_is_usable_with_the_keyboard(page: BrowserPage) -> None:
    async with live(*engines()[:1]) as antares, Traffic(antares):
        await page.open(f"{antares.url}/dashboard")
        await page.until(f"{LIVE} && {ACCEPTED} > 20")
        seen = []
        for _ in range(12):
            await page.press("Tab")
            seen.append(await page.evaluate(FOCUSED))
        assert seen[:4] == ["skip", "window", "theme", "group"]
        # A chart keeps the focus while it is redrawn, and arrow keys read its values.
        await page.evaluate("document.querySelector('#goodput svg').focus()")
        for _ in range(3):
            await page.press("ArrowLeft")
        await page.until("/\\d:\\d\\d.*chat .*\\/s/.test(document.querySelector('#goodput .readout').textContent)")
        await asyncio.sleep(2.2)
        assert await page.evaluate("document.activeElement.closest('figure').id") == "goodput"
        assert await page.evaluate(
            "[...document.querySelectorAll('svg[role=img]')].every(svg => svg.getAttribute('aria-label').length > 20)"
        )
    assert page.problems == []


@needs_chromium
async def test_page_is_live_for_an_operator_who_signed_in(page: BrowserPage) -> None:
    key = "operator-0123456789abcdef"
    keys = [{"sha256": hash_key(key), "tenant": "ops", "operator": True}]
    async with live(*engines()[:1], server={"operator_auth": True}, keys=keys) as antares:
        # What a browser asks for once, it sends with every later request, the event source's too.
        await page.open(f"{antares.url.replace('//', f'//any:{key}@')}/status")
        await page.open(f"{antares.url}/dashboard")
        await antares.ask(x_api_key=key)
        await page.until(f"{LIVE} && {ACCEPTED} === 1")
        assert key not in await page.evaluate("document.documentElement.outerHTML")
    assert page.problems == []
