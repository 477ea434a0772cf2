"""Measures recomputation after a burst: the size of its chunks, and the paced requests that it makes late. Simulated.

    python -m benchmarks.slack.recomputation --json > docs/results/recomputation.json
    python -m benchmarks.slack.recomputation --page docs/results/recomputation.json

A preempted request computes its prompt and its output again. The step gate counts all of these tokens as prefill: that
is *whole*. The gate of older versions counted the prompt's tokens: that is *prompt only*.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from statistics import median
from typing import Any

import typer

from benchmarks.command import AsJson, PageOf, Seeds, print_results, write_page
from benchmarks.markdown import table, wrapped
from engine_adapter.gates.base import Decoding, StepPlan
from engine_adapter.gates.slack import SlackGate
from engine_adapter.simulated.scheduler import SimulatedScheduler
from engine_adapter.simulated.sequence import SimulatedSequence
from engine_adapter.step_time.profile import Profile, load_profile

PROFILE = "a100-llama3.1-8b"
SLOTS, BUDGET, KV_TOKENS = 64, 2048, 25_600
PACES_MS = (16.0, 20.0, 30.0)
BEST_EFFORT, EVERY, BURSTS, BURST = 60, 10, (500, 700), 40
"""Best-effort requests at the start, steps between paced ones, the steps with a burst, and the requests of one."""
MAX_STEPS = 4000
COUNTED = ("prompt only", "whole")


class PromptOnlyGate(SlackGate):
    """The `slack` gate of older versions: it does not know that output is computed again."""

    scheduler: SimulatedScheduler

    def plan(
        self, now: float, decoding: Sequence[Decoding], prefill_backlog: int, yielding_prompts: bool = False
    ) -> StepPlan:
        """Plan with the tokens of prompts only."""
        tokens = sum([max(0, s.prompt_tokens - s.computed) for s in self.scheduler.sequences() if s.prefilling])
        return super().plan(now, decoding, min(BUDGET, tokens), yielding_prompts)


def requests(pace_s: float, seed: int) -> list[tuple[int, SimulatedSequence]]:
    """Return the requests, each with the step in which it arrives."""
    rng = random.Random(seed)
    found = [
        (0, SimulatedSequence(f"best-effort {number}", rng.randint(20, 60), 1200, gate="slack"))
        for number in range(BEST_EFFORT)
    ]
    found += [
        (step, SimulatedSequence(f"paced {step}", rng.randint(50, 200), rng.randint(20, 60), pace_s, "slack"))
        for step in range(0, MAX_STEPS, EVERY)
    ]
    found += [
        (burst, SimulatedSequence(f"burst {burst} {number}", 200, 300, pace_s, "slack"))
        for burst in BURSTS
        for number in range(BURST)
    ]
    return found


def run(counted: str, pace_ms: float, seed: int, profile: Profile) -> dict[str, Any]:
    """Return chunks, late tokens and late requests of one run. ``counted``: one of `COUNTED`."""
    pace_s = pace_ms / 1000
    gate = PromptOnlyGate() if counted == "prompt only" else SlackGate()
    scheduler = SimulatedScheduler(
        max_num_seqs=SLOTS, max_num_batched_tokens=BUDGET, max_model_len=4096, kv_tokens=KV_TOKENS, gate=gate
    )
    if isinstance(gate, PromptOnlyGate):
        gate.scheduler = scheduler
    arriving = requests(pace_s, seed)
    paced = [sequence for _, sequence in arriving if sequence.pace_s is not None]
    first_s, last_s = dict[str, float](), dict[str, float]()
    now, chunks, late_tokens = 0.0, list[int](), 0
    for number in range(MAX_STEPS):
        for _, sequence in [each for each in arriving if each[0] == number]:
            scheduler.submit(sequence)
        if number > max(BURSTS) and not (scheduler.running or scheduler.waiting):
            break
        step = scheduler.plan(now)
        if step.empty:
            now += pace_s / 10
            continue
        again = [tokens for sequence, tokens in step.chunks if sequence.preemptions]
        seconds = profile.step_seconds(
            len(step.decodes), step.decode_context, step.prefill_tokens, step.prefill_context, len(step.chunks) or 1
        )
        chunks += again
        now += seconds
        before = {sequence.request_id: sequence.generated for sequence in paced}
        scheduler.finish(step)
        gate.observe(step.report(seconds))
        for sequence in paced:
            if sequence.generated > before[sequence.request_id]:
                due_s = first_s.setdefault(sequence.request_id, now) + (sequence.generated - 1) * pace_s
                late_tokens += bool(again) and now > due_s
                last_s[sequence.request_id] = now
    done = [s for s in paced if s.generated > 1]
    late = [s for s in done if last_s[s.request_id] - first_s[s.request_id] > pace_s * (s.generated - 1)]
    return {
        "counted": counted, "pace_ms": pace_ms, "seed": seed, "recomputed": sum(chunks), "chunks": len(chunks),
        "largest_chunk": max(chunks, default=0), "late_tokens": late_tokens, "late": len(late), "paced": len(paced),
    }  # fmt: skip


def page(found: dict[str, Any]) -> str:
    """Return the result page of the JSON."""
    head = f"""# Recomputation after a burst

**Simulated**: the `slack` gate on {PROFILE}, {SLOTS} slots, {KV_TOKENS:,} tokens of KV memory. {BEST_EFFORT}
best-effort requests run, a short paced one arrives every {EVERY} steps, and two bursts of {BURST} paced requests
preempt best-effort ones. These compute their prompt and output again. {found["seeds"]} seeds: medians, and ranges in
brackets.

- *Counted*: what the gate counts as prefill. *Prompt only*: as older versions did, the prompt of a preempted request.
*Whole*: its output too.
- *Late tokens*: of paced requests, in steps that compute tokens again. Token g + 1 is due g paces after the first one.
- *Late requests*: of {found["runs"][0]["paced"]} paced ones, those whose TPOT exceeds the pace.

```
python -m benchmarks.slack.recomputation --json > docs/results/recomputation.json
python -m benchmarks.slack.recomputation --page docs/results/recomputation.json
```"""
    rows = []
    for pace_ms in PACES_MS:
        for counted in COUNTED:
            runs = [run for run in found["runs"] if run["counted"] == counted and run["pace_ms"] == pace_ms]
            cells = [
                _cell([run[key] for run in runs]) for key in ("recomputed", "largest_chunk", "late_tokens", "late")
            ]
            rows.append([f"{pace_ms:g} ms", counted, *cells])
    heads = ["pace", "counted", "tokens computed again", "largest chunk", "late tokens", "late requests"]
    return wrapped(head) + "\n\n" + table(heads, rows) + "\n"


def _cell(values: list[int]) -> str:
    return f"{median(values):,.0f} ({min(values):,} to {max(values):,})"


def main(
    seeds: Seeds = 3,
    as_json: AsJson = False,
    page_of: PageOf = None,
) -> None:
    """Simulate bursts that preempt best-effort requests. Takes about a minute."""
    if page_of is not None:
        write_page(page_of, page)
        return
    profile = load_profile(PROFILE)
    runs = [run(counted, pace, seed, profile) for pace in PACES_MS for counted in COUNTED for seed in range(seeds)]
    print_results({"profile": PROFILE, "seeds": seeds, "runs": runs}, as_json, page)


if __name__ == "__main__":
    typer.run(main)
