"""Explains in plain English what happened to a request, from the document of `GET /v1/requests/{id}`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Document = dict[str, Any]

_BOUNDS = {"ttft": "time to first token", "tpot": "time per output token", "e2e": "end-to-end latency"}
_HEADERS = {"ttft": "x-slo-ttft-ms", "tpot": "x-slo-tpot-ms", "e2e": "x-slo-e2e-ms"}

_REASONS = {
    "queue_full": "the queue of its SLO class was full",
    "rate_limited": "its tenant had used its tokens per minute",
    "gateway_full": "the gateway had too many open requests (server.max_open_requests)",
    "tenant_full": "its tenant, or its class there, had too many open requests (its part of server.max_open_requests)",
    "engine_down": "the engine was down and not expected back in time",
    "draining": "the gateway was shutting down, or the engine was removed",
    "engine_refused": "the engine found the request invalid; its response says why",
    "engine_busy": "the engine itself answered 429",
    "invalid_json": "its body nests too deeply",
    "engine_lost": "the engine died, hung or could not be reached while it served the request",
    "engine_error": "the engine answered with an error",
    "gateway_error": "an error inside the gateway; the log names it",
    "client_left": "the client disconnected",
    "client_slow": "the client read its response too slowly",
    "shutdown": "the gateway was stopped",
}
"""Reasons in the ledger, as a clause. A reason that is not here is shown as it is."""

_ENDS = {
    "moved": "the engine went down or rests, or another one began to serve, so the request was placed again",
    "hung": "the engine hung",
    "lost": "the engine died or the connection to it broke",
    "cut": "the response broke off",
    "unreachable": "the engine could not be reached",
    "error": "the engine's app failed",
    "stream_error": "the engine reported an error at the start of its stream",
}
"""Ends of attempts, as a clause."""

_SOURCES = {
    "rendered": "counted by the engine",
    "given": "given as tokens",
    "estimated": "estimated",
    "service": "by the predictor",
    "fallback": "from the recent lengths of its class, without the predictor",
    "hint": "stated by the client",
}


_SHOWN = 0.005
"""Least share of the time for which a part is shown."""


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a request's time. ``help`` says what would make it shorter; ``before_token``: it is part of TTFT."""

    name: str
    ms: float
    help: str
    before_token: bool


def explain(document: Document) -> str:
    """Return the explanation of one request, over several lines."""
    lines = [_headline(document), "", *_facts(document)]
    parts = time_parts(document)
    if parts:
        total = sum(part.ms for part in parts)
        parts = [part for part in parts if part.ms >= _SHOWN * total]
        lines += ["", "Where the time went:"]
        lines += [f"  {part.ms:>10.1f} ms  {part.ms / max(total, 1e-9):>4.0%}  {part.name}" for part in parts]
    advice = _advice(document, parts)
    if advice:
        lines += ["", "What would help:", *(f"  - {line}" for line in advice)]
    return "\n".join(lines)


def _headline(document: Document) -> str:
    outcome, reason, violated = document["outcome"], document["reason"] or "", document["violated"]
    name = f"Request {document['request_id'] or document['id']}"
    if outcome is None:
        if document["state"] == "waiting":
            return f"{name} is waiting for admission."
        return f"{name} is running on engine {document['engine']}."
    if outcome == "finished" and not violated:
        return f"{name} finished in time." if _bounds(document) else f"{name} finished. It had no bound."
    if outcome == "finished":
        return f"{name} finished, but missed {' and '.join(_miss(document, bound) for bound in violated)}."
    if outcome == "rejected" and reason.endswith("_unattainable"):
        return f"{name} was rejected: {_unattainable(document)}."
    why = _REASONS.get(reason, f"the reason is {reason!r}")
    if reason == "queue_full" and document["rejection"]:
        why += f" (classes.{document['slo_class']}.max_waiting is {document['rejection']['limit']})"
    verb = {"rejected": "was rejected", "failed": "failed", "cancelled": "was cancelled"}[outcome]
    return f"{name} {verb}: {why}."


def _miss(document: Document, bound: str) -> str:
    asked, got = document["slo"][f"{bound}_ms"], document["latency"][f"{bound}_ms"]
    if got is None:
        return f"its {_BOUNDS[bound]} of {asked:g} ms (no token was observed)"
    return f"its {_BOUNDS[bound]} of {asked:g} ms by {got - asked:.1f} ms ({got:.1f} ms)"


def _unattainable(document: Document) -> str:
    rejection, bound = document["rejection"], document["rejection"]["bound"]
    asked = document["slo"][f"{bound}_ms"]
    origin = f", the default of class {document['slo_class']}," if bound in document["slo"]["from_class"] else ""
    predicted = _number(rejection["predicted_ms"])
    text = f"its {_BOUNDS[bound]} of {asked:g} ms{origin} could not be met; {predicted} was predicted"
    return text + ("; an idle engine would miss it too" if rejection["infeasible"] else "")


def _facts(document: Document) -> list[str]:
    slo, prompt, output, latency = document["slo"], document["prompt"], document["output"], document["latency"]
    bounds = ", ".join(f"{bound.upper()} {slo[f'{bound}_ms']:g} ms" for bound in _bounds(document)) or "none"
    lines = [
        f"  arrived    {document['time']} at {document['route']}, tenant {document['tenant']}, "
        f"class {document['slo_class']}, model {document['model']}",
        f"  bounds     {bounds}" + (" (waived: served as best-effort)" if slo["waived"] else f" ({slo['kind']})"),
        f"  prompt     {_tokens(prompt['tokens'])}{_source(prompt['source'])}, {_cached(prompt)}",
    ]
    if output["predicted_tokens"] is not None:
        lines.append(
            f"  output     {_tokens(output['tokens'])}; {output['predicted_tokens']:.0f} predicted "
            f"(p90 {output['predicted_p90_tokens']:.0f}){_source(output['prediction_source'])}"
        )
    measured = [
        f"{bound.upper()} {latency[f'{bound}_ms']:.1f} ms"
        + (f" ({predicted:.1f} predicted)" if (predicted := latency.get(f"predicted_{bound}_ms")) is not None else "")
        for bound in _BOUNDS
        if latency[f"{bound}_ms"] is not None
    ]
    if measured:
        lines.append(f"  measured   {', '.join(measured)}")
    lines += [f"  engine     {_attempt(attempt)}" for attempt in document["attempts"]]
    if document["trace_id"]:
        lines.append(f"  trace      {document['trace_id']}")
    return lines


def _attempt(attempt: Document) -> str:
    text = (
        f"{attempt['engine']}: placed after {attempt['placed_ms']:.1f} ms beside {attempt['running_requests']} running "
        f"and {attempt['waiting_requests']} waiting requests, {attempt['ahead']} of them ahead"
    )
    if attempt["admitted_ms"] is not None:
        text += f"; admitted after {attempt['admitted_ms']:.1f} ms"
    if attempt["end"] is not None:
        ended = f" after {attempt['ended_ms']:.1f} ms" if attempt["ended_ms"] is not None else ""
        text += f"; ended{ended}: {_end(attempt)}"
    return text


def _end(attempt: Document) -> str:
    end: str = attempt["end"]
    if end.startswith("http_"):
        return f"the engine answered with status {end.removeprefix('http_')}"
    return _ENDS.get(end, end.replace("_", " "))


# --- where the time went ----------------------------------------------------------------------------------------------


def time_parts(document: Document) -> list[Part]:
    """Return the parts of the request's time, in order. They add up to the time until it ended."""
    timeline, attempts = document["timeline"], document["attempts"]
    ended = timeline["ended_ms"]
    parts: list[Part] = []
    at = 0.0

    def until(end: float | None, name: str, advice: str = "", before_token: bool = True) -> None:
        nonlocal at
        if end is not None and end > at:
            parts.append(Part(name, end - at, advice, before_token))
            at = end

    until(timeline["received_ms"], "receiving the request's body", "The client sends its body slowly, or it is large.")
    measuring = "A large prompt takes long to measure; see docs/prompts.md."
    until(timeline["predicting_ms"], "reading and measuring the prompt", measuring)
    slow = (
        "The predictor answers slowly: check its CPU load, or lower predictor.timeout_ms, or send x-slo-output-tokens."
    )
    until(timeline["predicted_ms"], "predicting the output length", slow)
    for attempt in attempts:
        until(attempt["placed_ms"], "choosing an engine")
        engine = attempt["engine"]
        queue = "Add engines, or use a class or a bound that may wait longer."
        until(attempt["admitted_ms"], f"waiting for admission to {engine}", queue)
        if attempt["end"] is not None and not _begun(document, attempt):
            until(attempt["ended_ms"], f"on {engine}, which did not serve it: {_end(attempt)}", _broken(engine))
    first, engine = timeline["first_token_ms"], document["engine"]
    if attempts and attempts[-1]["admitted_ms"] is not None:
        prefill = "Shorten the prompt, share its beginning with other requests (prefix cache), or use a faster engine."
        until(first, f"prefill on {engine}", prefill)
        if first is not None:
            tokens = document["output"]["tokens"]
            decode = "Limit the output (max_tokens), or run fewer sequences at once (max-num-seqs)."
            until(ended, f"decode of {_tokens(tokens)} on {engine}", decode, before_token=False)
        until(ended, f"on {engine}, without a token", _broken(engine))
    until(ended, "waiting for admission", "Add engines, or use a class or a bound that may wait longer.")
    return parts


def _begun(document: Document, attempt: Document) -> bool:
    """Whether the response had begun when the attempt failed."""
    first, admitted = document["timeline"]["first_token_ms"], attempt["admitted_ms"]
    return first is not None and admitted is not None and admitted <= first


def _broken(engine: str) -> str:
    return (
        f"Check engine {engine}: its log, and antares_engine_circuit. Lower failover.first_token_timeout_s if it hangs."
    )


# --- what would help --------------------------------------------------------------------------------------------------


def _advice(document: Document, parts: list[Part]) -> list[str]:
    outcome, reason = document["outcome"], document["reason"] or ""
    if outcome == "rejected":
        return _advice_on_rejection(document, reason)
    if outcome == "finished" and document["violated"]:
        return [line for bound in document["violated"] for line in _advice_on_miss(document, bound, parts)]
    if outcome == "failed":
        failing = [a["engine"] for a in document["attempts"] if a["end"] is not None] or [document["engine"]]
        return [] if reason in ("draining", "gateway_error") or not failing[-1] else [_broken(failing[-1])]
    if outcome == "cancelled" and reason == "client_left" and parts:
        largest = max(parts, key=lambda part: part.ms)
        return [f"The client left while most of its time was {largest.name}. {largest.help}".rstrip()]
    return []


def _advice_on_rejection(document: Document, reason: str) -> list[str]:
    rejection = document["rejection"] or {}
    bound, attainable = rejection.get("bound"), rejection.get("attainable_ms")
    if bound is None:
        limit = f"classes.{document['slo_class']}.max_waiting"
        advice = {
            "queue_full": f"Add engines, raise {limit}, or use a class with a shorter queue.",
            "rate_limited": "Retry later, or have the operator raise tokens_per_minute of the tenant.",
            "gateway_full": "Add engines, or raise server.max_open_requests.",
            "tenant_full": "Send fewer requests at once, or raise the tenant's weight or server.max_open_requests.",
            "engine_down": "Retry later, or add an engine that serves the model too.",
            "draining": "Send the request to another gateway, or to this one after its restart.",
            "engine_busy": "Add engines.",
        }.get(reason)
        return [advice] if advice else []
    lines = []
    if attainable is not None:
        lines.append(f"Set {_HEADERS[bound]} to {attainable:.0f} or more, which would probably have been accepted.")
    lines.append("Use a class with looser bounds, or one with on_unattainable: best_effort.")
    if rejection["infeasible"]:
        lines.append("More engines of this kind do not help: an idle one misses the bound too. A faster one may.")
    else:
        lines.append(f"Retry after {max(1.0, rejection['retry_after_s']):.0f} s, or add engines.")
    return lines


def _advice_on_miss(document: Document, bound: str, parts: list[Part]) -> list[str]:
    latency, output = document["latency"], document["output"]
    got = latency[f"{bound}_ms"]
    lines = []
    if bound == "tpot":
        predicted = latency["predicted_tpot_ms"]
        if predicted is not None and got is not None:
            slower = "Steps became longer after it" if got > 1.2 * predicted else "Steps were that long already"
            lines.append(
                f"{slower}: {predicted:.1f} ms was the step time at admission, {got:.1f} ms the mean after it."
            )
        lines.append("If steps vary, lower max-num-seqs.")
    else:
        counted = [part for part in parts if part.before_token or bound == "e2e"]
        if counted:
            largest = max(counted, key=lambda part: part.ms)
            lines.append(f"The largest part was {largest.name} ({largest.ms:.1f} ms). {largest.help}".rstrip())
        predicted = latency["predicted_ttft_ms"]
        if bound == "ttft" and predicted is not None and got is not None and got > 1.5 * predicted:
            lines.append(
                f"Admission predicted {predicted:.0f} ms: check antares_step_time_r2 and antares_step_seconds_total."
            )
        each = output["tokens"] / max(1, output["sequences"])
        if bound == "e2e" and output["predicted_tokens"] and each > 1.5 * output["predicted_tokens"]:
            lines.append(f"The output was {each / output['predicted_tokens']:.1f} times as long as predicted.")
    if got is not None:
        lines.append(f"A bound of {got:.0f} ms would have been met ({_HEADERS[bound]}).")
    return lines


# --- words ------------------------------------------------------------------------------------------------------------


def _bounds(document: Document) -> list[str]:
    return [bound for bound in _BOUNDS if document["slo"][f"{bound}_ms"] is not None]


def _tokens(count: int) -> str:
    return f"{count} token" if count == 1 else f"{count} tokens"


def _number(ms: float | None) -> str:
    return "no finite value" if ms is None else f"{ms:.0f} ms"


def _source(source: str | None) -> str:
    return f", {_SOURCES.get(source, source)}" if source else ""


def _cached(prompt: Document) -> str:
    if prompt["cached_tokens"] is None:
        return f"{prompt['predicted_cached_tokens']} predicted to be cached"
    return f"{prompt['cached_tokens']} cached ({prompt['predicted_cached_tokens']} predicted)"
