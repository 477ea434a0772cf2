"""Arrivals and outcomes of a run over time."""

from __future__ import annotations

from collections.abc import Sequence

from lab.records.run_record import RequestResult


def timeline(results: Sequence[RequestResult], bins: int) -> list[dict[str, float | None]]:
    """Return, for each of ``bins`` equal parts of the arrivals, its start and what became of its requests.

    ``at_s``: start (s). ``arrivals`` and ``attained``: requests per second that arrived then, and those of them that
    attained their SLO. ``slo_adherence``: the share; None without arrivals. ``output_tokens``: tokens per second that
    those finished requests got.
    """
    if not results:
        return []
    first_s = results[0].request.at_s
    width_s = max(results[-1].request.at_s - first_s, 1e-9) / bins
    parts: list[list[RequestResult]] = [[] for _ in range(bins)]
    for result in results:
        parts[min(int((result.request.at_s - first_s) / width_s), bins - 1)].append(result)
    found = []
    for number, part in enumerate(parts):
        attained = sum(result.attained for result in part)
        tokens = sum(result.request.output_tokens for result in part if result.outcome == "finished")
        found.append({
            "at_s": round(first_s + number * width_s, 3),
            "arrivals": round(len(part) / width_s, 4),
            "attained": round(attained / width_s, 4),
            "slo_adherence": round(attained / len(part), 4) if part else None,
            "output_tokens": round(tokens / width_s, 1),
        })  # fmt: skip
    return found
