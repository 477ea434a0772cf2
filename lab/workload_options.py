"""The options of the measuring commands that say what is asked of a server, and what `make_workload` makes of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

Workload = Annotated[
    str, typer.Option(help="Lengths: sharegpt, lmsys-like, azure-conv, azure-code, code-chat or small (docs/bench.md).")
]
Requests = Annotated[int | None, typer.Option(min=1, help="Arrivals end after so many requests.")]
Duration = Annotated[
    float | None, typer.Option(help="Arrivals end after so many seconds; simulate: 60 unless told.", metavar="SECONDS")
]
Arrivals = Annotated[str, typer.Option(help="poisson, gamma (bursts: --burstiness) or trace (recorded times).")]
Burstiness = Annotated[float, typer.Option(help="Coefficient of variation of the gaps; above 1, bursts.")]
Trace = Annotated[str | None, typer.Option(help="Whose arrival times: azure-conv or azure-code.")]
Speed = Annotated[float, typer.Option(help="Replay a trace so many times as fast (or give --qps).")]
Window = Annotated[float | None, typer.Option(help="Only the first so many seconds of the trace.", metavar="SECONDS")]
SloTable = Annotated[
    str, typer.Option(help="The papers' bounds: llama-3.1-8b, gemma-2-27b, annealing-paper; or code-chat.")
]
SloScale = Annotated[float, typer.Option(help="Multiplies every bound.")]
Mix = Annotated[str | None, typer.Option(help="Weights of categories, such as 1=3,6=1. Default: all the same.")]
MaxPrompt = Annotated[int | None, typer.Option(min=1, help="Longest prompt, in tokens.")]
MaxOutput = Annotated[int | None, typer.Option(min=1, help="Longest answer, in tokens.")]

_ARGUMENTS = {
    "requests": "requests",
    "duration": "duration_s",
    "arrivals": "arrivals",
    "burstiness": "burstiness",
    "trace": "trace",
    "speed": "speed",
    "window": "window_s",
    "slo_table": "slo_table",
    "slo_scale": "slo_scale",
    "mix": "mix",
    "max_prompt": "max_prompt",
    "max_output": "max_output",
}
"""Each option's argument of `make_workload`."""


def workload_arguments(options: Mapping[str, Any], unless_told_s: float | None = None) -> dict[str, Any]:
    """`make_workload`'s arguments, but for name, rate and seed, from a command's ``options`` by name.

    Poisson arrivals with a burstiness of their own are Gamma. ``unless_told_s``: the duration (s) of arrivals that
    nothing else ends. ValueError: the mix cannot be read.
    """
    arguments = {argument: options[option] for option, argument in _ARGUMENTS.items()}
    arguments["mix"] = _mix(options["mix"])
    if options["arrivals"] == "poisson" and options["burstiness"] != 1:
        arguments["arrivals"] = "gamma"
    if options["duration"] is None and options["requests"] is None and options["arrivals"] != "trace":
        arguments["duration_s"] = unless_told_s
    return arguments


def _mix(text: str | None) -> dict[int, float] | None:
    if text is None:
        return None
    try:
        return {int(category): float(weight) for category, weight in (part.split("=") for part in text.split(","))}
    except ValueError:
        raise ValueError(f"--mix is written CATEGORY=WEIGHT,..., such as 1=3,6=1; got {text!r}") from None
