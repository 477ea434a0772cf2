"""Workload options that `simulate` and `bench` share, and their translation to arguments of `make_workload`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer

Workload = Annotated[
    str,
    typer.Option(
        help="Prompt and output lengths: sharegpt, lmsys-like, azure-conv, azure-code, code-chat or small. "
        "Or sessions with a growing history: multi-turn or agents. Or a file, as with --trace."
    ),
]
Requests = Annotated[int | None, typer.Option(min=1, help="Stop arrivals after N requests.", metavar="N")]
Duration = Annotated[
    float | None,
    typer.Option(
        help="Stop arrivals after SECONDS. simulate: 60 by default. bench needs this, --requests or a trace.",
        metavar="SECONDS",
    ),
]
Arrivals = Annotated[
    str, typer.Option(help="poisson, gamma (bursty, see --burstiness) or trace (recorded arrival times).")
]
Burstiness = Annotated[
    float, typer.Option(help="Coefficient of variation of the gaps between arrivals; above 1 is bursty.")
]
Trace = Annotated[
    str | None,
    typer.Option(
        help="Trace with the arrival times: azure-conv or azure-code. Or a file with its requests: JSON lines of "
        "Mooncake, of vLLM's timed_trace, of Bailian or of this gateway, or the CSV of Azure or BurstGPT."
    ),
]
RateScale = Annotated[
    float, typer.Option(help="Factor on the rate of a trace that keeps its time scale: overlaid, shifted copies.")
]
TraceUnit = Annotated[
    str | None, typer.Option(help="Unit of a file's timestamps: s or ms.", show_default="as its format has it")
]
TraceBlockTokens = Annotated[
    int | None,
    typer.Option(min=1, help="Tokens for each of a file's hash_ids.", show_default="512, as Mooncake"),
]
TraceModel = Annotated[
    list[str] | None,
    typer.Option(help="Only the requests of this model in a recording; repeatable.", show_default="all"),
]
Speed = Annotated[float, typer.Option(help="Speed-up factor of a trace. Do not combine with --qps.")]
Window = Annotated[float | None, typer.Option(help="Replay only the first SECONDS of the trace.", metavar="SECONDS")]
SloTable = Annotated[
    str, typer.Option(help="SLO bounds per category: llama-3.1-8b, gemma-2-27b, annealing-paper, code-chat or agents.")
]
SloScale = Annotated[float, typer.Option(help="Factor on every bound.")]
Mix = Annotated[
    str | None,
    typer.Option(help="Weights of SLO categories, such as 1=3,6=1.", show_default="equal weights"),
]
MaxPrompt = Annotated[
    int | None, typer.Option(min=1, help="Maximum prompt length (tokens); in sessions with the history.")
]
MaxOutput = Annotated[int | None, typer.Option(min=1, help="Maximum output length (tokens).")]

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
    "rate_scale": "rate_scale",
    "trace_unit": "trace_unit",
    "trace_block_tokens": "trace_block_tokens",
    "trace_model": "trace_models",
    "max_prompt": "max_prompt",
    "max_output": "max_output",
}
"""Option name to argument of `make_workload`."""


def workload_arguments(
    options: Mapping[str, Any], default_duration_s: float | None = None, classes: Sequence[str] = ()
) -> dict[str, Any]:
    """Return the arguments of `make_workload`, except name, rate and seed, from a command's ``options``.

    Poisson arrivals with a burstiness other than 1 become Gamma arrivals. ``default_duration_s`` (s) applies if neither
    a duration, a number of requests nor a trace ends the arrivals. ``classes``: names of the categories for ``--mix``.

    Raises:
        ValueError: the mix is malformed.
    """
    from lab.workload.trace_file import is_trace_file

    arguments = {argument: options[option] for option, argument in _ARGUMENTS.items()}
    arguments["mix"] = _mix(options["mix"], classes)
    arguments["trace_models"] = options["trace_model"] or ()
    if options["arrivals"] == "poisson" and options["burstiness"] != 1:
        arguments["arrivals"] = "gamma"
    if options["trace"] is not None and is_trace_file(options["trace"]):
        # The file has the lengths too: `workload_name` makes it the workload.
        arguments |= {"arrivals": "trace", "trace": None}
    if options["duration"] is None and options["requests"] is None and arguments["arrivals"] != "trace":
        arguments["duration_s"] = default_duration_s
    return arguments


def workload_name(options: Mapping[str, Any]) -> str:
    """Return the name of the workload that a command's ``options`` choose: a file of ``--trace``, or ``--workload``."""
    from lab.workload.trace_file import is_trace_file

    trace = options["trace"]
    return str(trace if trace is not None and is_trace_file(trace) else options["workload"])


def _mix(text: str | None, classes: Sequence[str]) -> dict[int, float] | None:
    if text is None:
        return None
    numbers = {name: number for number, name in enumerate(classes, 1)}
    try:
        parts = [part.split("=") for part in text.split(",")]
        return {numbers[name] if classes else int(name): float(weight) for name, weight in parts}
    except (KeyError, ValueError):
        form = "CATEGORY=WEIGHT,..., such as 1=3,6=1"
        if classes:
            form = f"CLASS=WEIGHT,... with the classes of --config, which are {', '.join(classes)}"
        raise ValueError(f"--mix must have the form {form}; got {text!r}") from None
