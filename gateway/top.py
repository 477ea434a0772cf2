"""`antares top`: the live feed of a gateway in the terminal. It needs only the gateway's URL."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import httpx
import orjson
from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

PATH = "/dashboard/events"

SILENCE_S = 8.0
"""Seconds without a snapshot after which the connection counts as lost."""

RETRY_S = 2.0
"""Seconds between two attempts to connect."""

_BLOCKS = " ▁▂▃▄▅▆▇█"


class TopError(Exception):
    """The gateway gives no live feed. The message says what to fix."""


async def run(url: str, key: str | None, once: bool, console: Console) -> None:
    """Show the feed until `q` is pressed, reconnecting as needed; with ``once`` print one frame.

    Raises `TopError` if the gateway denies the feed, and with ``once`` also if it is not reachable.
    """
    headers = {"authorization": f"Bearer {key}"} if key else {}
    timeout = httpx.Timeout(SILENCE_S)
    try:
        client = httpx.AsyncClient(base_url=url, headers=headers, timeout=timeout, trust_env=False)
    except httpx.InvalidURL as error:
        raise TopError(f"{url} is no URL: {error}. Set --url.") from error
    async with client as http:
        if once:
            await _print_once(http, console)
            return
        quit_pressed = asyncio.Event()
        with (
            _keys(quit_pressed.set),
            Live(Text("Connecting…"), console=console, screen=True, auto_refresh=False) as live,
        ):
            showing = asyncio.create_task(_show(http, live))
            leaving = asyncio.create_task(quit_pressed.wait())
            try:
                await asyncio.wait({showing, leaving}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                leaving.cancel()
                showing.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await showing


async def _print_once(http: httpx.AsyncClient, console: Console) -> None:
    try:
        async for view in _views(http):
            console.print(frame(view, console.width, console.height, ""))
            return
    except httpx.HTTPError as error:
        raise TopError(f"{http.base_url} is not reachable: {_why(error)}. Set --url.") from error


async def _show(http: httpx.AsyncClient, live: Live) -> None:
    view: View | None = None
    while True:
        try:
            async for view in _views(http):
                live.update(_framed(live.console, view, ""), refresh=True)
            trouble = "the gateway ended the feed"
        except httpx.HTTPError as error:
            trouble = _why(error)
        live.update(_framed(live.console, view, f"reconnecting: {trouble}"), refresh=True)
        await asyncio.sleep(RETRY_S)


def _framed(console: Console, view: View | None, trouble: str) -> RenderableType:
    return Text(trouble) if view is None else frame(view, console.width, console.height, trouble)


class View:
    """The newest snapshot and the samples of the last minutes."""

    def __init__(self, samples: list[Any]) -> None:
        self.samples = samples
        self.snapshot: dict[str, Any] = {}

    def take(self, snapshot: dict[str, Any]) -> None:
        """Take over a snapshot; keeps at most 15 minutes of samples."""
        self.snapshot = snapshot
        self.samples = [*self.samples[-900:], snapshot["sample"]]


async def _views(http: httpx.AsyncClient) -> AsyncIterator[View]:
    """Yield the view after each snapshot. Raises `TopError` for anything but a live feed, and httpx.HTTPError."""
    async with http.stream("GET", PATH) as response:
        if response.status_code != 200:
            await response.aread()
            if response.status_code == 503:
                raise httpx.HTTPError("the gateway has too many viewers or stops")
            advice = " Is --url a gateway?"
            if response.status_code in (401, 403):
                advice = " Set ANTARES_OPERATOR_KEY, or --key-env, to the key of an operator."
            raise TopError(f"{http.base_url}{PATH.lstrip('/')} answers {response.status_code}.{advice}")
        if not response.headers.get("content-type", "").startswith("text/event-stream"):
            raise TopError(f"{http.base_url}{PATH.lstrip('/')} is no live feed. Is --url a gateway?")
        view, name = View([]), ""
        async for line in response.aiter_lines():
            field, _, value = line.partition(": ")
            if field == "event":
                name = value
            elif field == "data" and name == "history":
                view = View(orjson.loads(value)["samples"])
            elif field == "data":
                view.take(orjson.loads(value))
                yield view


def _why(error: httpx.HTTPError) -> str:
    return str(error) or type(error).__name__


@contextlib.contextmanager
def _keys(on_quit: Callable[[], None]) -> Iterator[None]:
    """Call ``on_quit`` when `q` is pressed. Without a terminal, or on Windows, Ctrl-C is the only key."""
    try:
        import termios
        import tty
    except ImportError:
        yield
        return
    if not sys.stdin.isatty():
        yield
        return
    descriptor, loop = sys.stdin.fileno(), asyncio.get_running_loop()
    before = termios.tcgetattr(descriptor)

    def on_key() -> None:
        if os.read(descriptor, 1) in (b"q", b"Q", b""):
            on_quit()

    tty.setcbreak(descriptor)
    loop.add_reader(descriptor, on_key)
    try:
        yield
    finally:
        loop.remove_reader(descriptor)
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


# --- one frame --------------------------------------------------------------------------------------------------------


def frame(view: View, width: int, height: int, trouble: str) -> RenderableType:
    """Return the screen for ``view``, of at most ``height`` lines. ``trouble``: why it is not live, or ""."""
    now = view.snapshot
    window = now["windows"]["1m"]
    lines = height - 1
    head = [_title(now, width, trouble), _verdict(now, window)]
    classes, engines = _classes(view, window, width), _engines(now, width)
    tenants = _tenants(now, window)
    # Each table has a line of headings. The tenants give way first, then the reasons.
    lines -= len(head) + len(now["classes"]) + len(now["engines"]) + len(now["starting"]) + 4
    reasons = _reasons(window, width)[: max(0, min(6, lines))]
    parts: list[RenderableType] = [*head, Text(), classes, Text(), engines]
    if reasons:
        lines -= len(reasons) + 1
        parts += [Text(), *reasons]
    if lines > 3:
        parts += [Text(), tenants(lines - 2)]
    return Group(*parts)


def _title(now: dict[str, Any], width: int, trouble: str) -> Text:
    left = (
        f"Antares {now['version']} · {now['policy']} · predictor {now['predictor']} · up {_duration(now['uptime_s'])}"
    )
    right = trouble or ("draining" if now["draining"] else "live · q quits")
    text = Text(left, style="bold")
    text.append(" " * max(1, width - cell_len(left) - cell_len(right)))
    text.append(right, style="bold red" if trouble or now["draining"] else "green")
    text.truncate(width)
    return text


def _verdict(now: dict[str, Any], window: dict[str, Any]) -> Text:
    total = window["total"]
    text = Text("1 min: adherence ")
    text.append(_percent(total["adherence"]), style=_style(total["adherence"]))
    text.append(f" · goodput {total['goodput_per_s']:.1f}/s of {total['arrived_per_s']:.1f}/s")
    text.append(f" · {total['output_tokens_per_s']:.0f} tok/s · open {now['ledger']['open']}")
    return text


def _classes(view: View, window: dict[str, Any], width: int) -> Table:
    table = _table(
        "class", "adher.", "good/s", "offer/s", "wait", "run", "TTFT p99/bound", "TPOT p99/bound", "e2e bound"
    )
    spark = width - 92
    if spark >= 10:
        table.add_column("adherence, 15 min", no_wrap=True)
    for name, now in view.snapshot["classes"].items():
        seen = window["classes"].get(name, {})
        cells: list[str | Text] = [
            escape(name),
            Text(_percent(seen.get("adherence")), _style(seen.get("adherence"))),
            f"{seen.get('goodput_per_s', 0):.1f}",
            f"{seen.get('arrived_per_s', 0):.1f}",
            str(now["waiting"]),
            str(now["running"]),
            _against(now["ttft_p99_ms"], now["slo_ttft_ms"]),
            _against(now["tpot_p99_ms"], now["slo_tpot_ms"]),
            _ms(now["slo_e2e_ms"]),
        ]
        if spark >= 10:
            values = [sample[1].get(name, [None])[0] for sample in view.samples]
            cells.append(_sparkline(values, min(spark, 40)))
        table.add_row(*cells)
    return table


def _engines(now: dict[str, Any], width: int) -> Table:
    table = _table("engine", "state", "run/slots", "wait", "KV", "restarts", "step error", "model")
    for engine in now["engines"]:
        quality = now["step_times"].get(engine["name"], {}).get("quality")
        table.add_row(
            escape(engine["name"]),
            _engine_state(engine),
            f"{engine['running']}/{engine['slots']}",
            str(engine["waiting"]),
            _percent(engine["kv_usage"]),
            str(engine["restarts"]),
            _percent(quality["mape"]) if quality else "–",
            escape(engine["model"]),
        )
    for engine in now["starting"]:
        table.add_row(escape(engine["name"]), Text("starting", style="yellow"), *"––––––")
    return table


def _reasons(window: dict[str, Any], width: int) -> list[Text]:
    found = []
    for reason in window["reasons"]:
        if reason["outcome"] != "cancelled":
            what = "served late" if reason["outcome"] == "missed" else reason["outcome"]
            text = Text(f"{reason['count']:>6}  {reason['slo_class']}: {what}, {reason['reason']}")
            text.truncate(width, overflow="ellipsis")
            found.append(text)
    return [Text("Not attained in 1 min:", style="dim"), *found] if found else []


def _tenants(now: dict[str, Any], window: dict[str, Any]) -> Callable[[int], Table]:
    def shown(rows: int) -> Table:
        table = _table("tenant", "adher.", "good/s", "offer/s", "tok/s", "wait", "run")
        for name in list(dict.fromkeys([*window["tenants"], *now["tenants"]]))[:rows]:
            seen, here = window["tenants"].get(name, {}), now["tenants"].get(name, {})
            table.add_row(
                escape(name),
                Text(_percent(seen.get("adherence")), _style(seen.get("adherence"))),
                f"{seen.get('goodput_per_s', 0):.1f}",
                f"{seen.get('arrived_per_s', 0):.1f}",
                f"{seen.get('output_tokens_per_s', 0):.0f}",
                str(here.get("waiting", 0)),
                str(here.get("running", 0)),
            )
        return table

    return shown


def _table(*heads: str) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim", collapse_padding=True)
    for head in heads:
        text = head in ("class", "engine", "state", "model", "tenant")
        limit = 16 if head in ("class", "engine", "tenant") else None
        table.add_column(head, justify="left" if text else "right", no_wrap=True, overflow="ellipsis", max_width=limit)
    return table


def _engine_state(engine: dict[str, Any]) -> Text:
    if not engine["alive"]:
        return Text("down", "bold red")
    if engine["circuit"] == "open":
        return Text(f"rests {engine['rests_for_s']:.0f} s", "bold red")
    return Text("alive", "green") if engine["circuit"] == "closed" else Text(engine["circuit"], "yellow")


def _against(value: float | None, bound: float | None) -> Text:
    late = value is not None and bound is not None and value > bound
    return Text(f"{_ms(value)}/{_ms(bound)}", "bold red" if late else "")


def _sparkline(values: list[float | None], width: int) -> Text:
    """Return the worst adherence of each of ``width`` stretches of time, as blocks from 50% to 100%."""
    size = max(1, -(-len(values) // width))
    text = Text()
    for start in range(0, len(values), size):
        stretch = [value for value in values[start : start + size] if value is not None]
        worst = min(stretch, default=None)
        text.append(" " if worst is None else _BLOCKS[max(1, round((2 * worst - 1) * 8))], _style(worst))
    return text


def _style(adherence: float | None) -> str:
    if adherence is None:
        return "dim"
    return "green" if adherence >= 0.99 else "yellow" if adherence >= 0.9 else "bold red"


def _percent(value: float | None) -> str:
    return "–" if value is None else "100%" if value == 1 else f"{int(value * 1000) / 10:.1f}%"


def _ms(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value / 1000:.3g}s" if value >= 1000 else f"{value:.3g}ms"


def _duration(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
