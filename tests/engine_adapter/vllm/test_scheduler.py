"""vLLM's own scheduler with the step gate: real requests and KV memory, without a model or an engine."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from engine_adapter.gates import composite
from engine_adapter.gates.slack import SlackGate
from engine_adapter.service_kind import ServiceKind, default_kind
from engine_adapter.simulated.prompt import block_hashes
from engine_adapter.simulated.scheduler import SimulatedScheduler
from engine_adapter.simulated.sequence import SimulatedSequence
from engine_adapter.step_time.linear_forms import StepTimes
from engine_adapter.step_time.model import StepTimeModel
from engine_adapter.vllm.gate_channel import GateReporter

if TYPE_CHECKING:
    from tests.fixtures.vllm_stepping import SteppedScheduler

# vLLM is imported, which takes seconds and much memory; no engine is started.
pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

Make = Callable[..., "SteppedScheduler"]

BLOCK_TOKENS, OUTPUT_TOKEN = 16, 7
"""As in `SteppedScheduler`."""

TIMES = StepTimes(a=0.0, b=1e-3, c=0.0, d=0.01, alpha=2e-4, beta=0.0)
"""A step takes 10 ms, 1 ms per decode and 0.2 ms per prompt token."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("vllm")
    from tests.fixtures.vllm_stepping import write_model_config

    return write_model_config(tmp_path_factory.mktemp("scheduler"))


@pytest.fixture
def make(model: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Make schedulers, each with a clock and a reporter of its own. Their `slack` gate has fixed step times."""
    # Not at the top: importing vLLM takes seconds, also when tests are only collected.
    from engine_adapter.vllm import scheduler as vllm_scheduler
    from tests.fixtures.vllm_stepping import SteppedScheduler

    def fixed_slack_gate() -> SlackGate:
        return SlackGate(StepTimeModel(times=TIMES, learn=False))

    monkeypatch.setitem(composite.GATES, "slack", fixed_slack_gate)

    def make_scheduler(**limits: Any) -> SteppedScheduler:
        clock: Any = SimpleNamespace(now=1000.0)
        clock.monotonic = clock.perf_counter = lambda: clock.now
        reporter = GateReporter(None)
        monkeypatch.setattr(vllm_scheduler, "time", clock)
        monkeypatch.setattr(GateReporter, "from_env", lambda: reporter)
        return SteppedScheduler(model, clock, reporter, **limits)

    return make_scheduler


# --- the same steps as the simulated scheduler ------------------------------------------------------------------------


def random_request(rng: random.Random, name: str, gates: list[str]) -> SimulatedSequence:
    pace_s = rng.choice([None, None, 0.03, 0.05, 0.5, 2.0])
    kind = rng.choice([default_kind(pace_s)] * 3 + [ServiceKind.BEST_EFFORT, ServiceKind.YIELDING])
    if pace_s is None:
        kind = rng.choice([ServiceKind.DEADLINE_ONLY, ServiceKind.BEST_EFFORT, ServiceKind.YIELDING])
    return SimulatedSequence(name, rng.randint(1, 150), rng.randint(1, 60), pace_s, rng.choice(gates), kind)


def run_both(make: Make, seed: int, gates: list[str], blocks: int, budgets: list[int]) -> int:
    """Step both schedulers with the same arrivals; return the best-effort preemptions. Fails where steps differ."""
    rng = random.Random(seed)
    slots, budget = rng.choice([2, 4, 8, 24]), rng.choice(budgets)
    vllm = make(seqs=slots, blocks=blocks, budget=budget, overlap=False)
    # One of vLLM's blocks is its own.
    simulated = SimulatedScheduler(
        max_num_seqs=slots, max_num_batched_tokens=budget, max_model_len=300, kv_tokens=16 * (blocks - 1),
        gate=composite.Gates(),
    )  # fmt: skip
    for number in range(400):
        if number < 200 and rng.random() < 0.3:
            sequence = random_request(rng, f"r{number}", gates)
            vllm.add(
                sequence.request_id,
                sequence.prompt_tokens,
                sequence.output_tokens,
                tpot_ms=None if sequence.pace_s is None else 1000 * sequence.pace_s,
                gate=sequence.gate,
                kind=sequence.kind.label,
            )
            simulated.submit(sequence)
        step = simulated.plan(vllm.clock.now)
        scheduled = {s.request_id: 1 for s in step.decodes} | {s.request_id: tokens for s, tokens in step.chunks}
        assert vllm.step() == scheduled, f"step {number}"
        simulated.finish(step)
    assert vllm.best_effort_preemptions == simulated.best_effort_preemptions
    return vllm.best_effort_preemptions


@pytest.mark.parametrize("gates", [["open"], ["credit"], ["slack"], ["slack", "credit", "open"]], ids="-".join)
def test_steps_equal_simulated_scheduler(make: Make, gates: list[str]) -> None:
    preemptions = sum(run_both(make, seed, gates, blocks=1000, budgets=[32, 100, 512]) for seed in range(12))
    assert (preemptions > 0) == ("slack" in gates)


def test_steps_equal_simulated_scheduler_when_memory_is_short(make: Make) -> None:
    # vLLM allocates a prompt chunk by chunk, the simulated scheduler all of it, so only whole prompts are comparable.
    for seed in range(12):
        run_both(make, seed, ["open"], blocks=60, budgets=[4096])


def run_both_with_caching(make: Make, seed: int, blocks: int, budget: int) -> int:
    """Step both schedulers with prompts that share prefixes; return the cached tokens. Fails where steps differ."""
    rng = random.Random(seed)
    slots = rng.choice([2, 4, 8])
    vllm = make(seqs=slots, blocks=blocks, budget=budget, overlap=False, caching=True)
    simulated = SimulatedScheduler(
        max_num_seqs=slots, max_num_batched_tokens=budget, max_model_len=300, kv_tokens=16 * (blocks - 1)
    )
    histories = [[rng.randint(10, 60) for _ in range(rng.randint(1, 90))] for _ in range(4)]
    cached: list[int] = []
    for number in range(500):
        if number < 300 and rng.random() < 0.2:
            history = rng.choice(histories)
            prompt = history[: rng.choice([len(history), rng.randint(1, len(history))])]
            prompt = prompt + [rng.randint(10, 60) for _ in range(rng.randint(0, 40))]
            output = rng.randint(1, 40)
            context = prompt + [OUTPUT_TOKEN] * output
            if len(context) < 200:
                histories[rng.randrange(4)] = context
            vllm.add(f"r{number}", prompt, output, gate="open")
            simulated.submit(
                SimulatedSequence(
                    f"r{number}", len(prompt), output, blocks=block_hashes(0, context), on_cached=cached.append
                )
            )
        step = simulated.plan(vllm.clock.now)
        scheduled = {s.request_id: 1 for s in step.decodes} | {s.request_id: tokens for s, tokens in step.chunks}
        assert vllm.step() == scheduled, f"step {number}"
        simulated.finish(step)
    return sum(cached)


@pytest.mark.parametrize("budget", [32, 512])
def test_prefix_cache_hits_equal_simulated_scheduler(make: Make, budget: int) -> None:
    assert sum(run_both_with_caching(make, seed, blocks=1000, budget=budget) for seed in range(12)) > 10_000


def test_evictions_equal_simulated_scheduler_when_memory_is_short(make: Make) -> None:
    cached = [
        sum(run_both_with_caching(make, seed, blocks=blocks, budget=4096) for seed in range(8)) for blocks in (40, 80)
    ]
    assert 0 < cached[0] < cached[1], "less memory keeps fewer blocks"


# --- tokens and memory ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(24))
def test_each_request_gets_its_tokens_and_memory_is_freed(make: Make, seed: int) -> None:
    rng = random.Random(seed)
    engine = make(seqs=rng.choice([2, 4, 8, 24]), blocks=rng.choice([30, 60, 200]), budget=rng.choice([32, 300]))
    requests, aborted = {}, set()
    for step in range(300):
        if step < 200 and rng.random() < 0.4:
            name, gate = f"r{step}", rng.choice(["slack", "slack", "slack", "credit", "open"])
            kind = rng.choice([None, None, None, "deadline_only", "best_effort"])
            sizes = rng.randint(1, 150), rng.randint(1, 90)
            requests[name] = engine.add(name, *sizes, rng.choice([None, None, 50, 500]), gate, kind)
        if rng.random() < 0.05 and engine.scheduler.requests:
            name = rng.choice(sorted(engine.scheduler.requests))
            engine.abort(name)
            aborted.add(name)
        engine.step()
    engine.drain()
    for name, request in requests.items():
        if name not in aborted:
            assert engine.generated[name] == request.num_output_tokens == request.max_tokens


# --- best-effort preemption -------------------------------------------------------------------------------------------


def full_of_best_effort(make: Make, waiting: int = 0, **xargs: Any) -> SteppedScheduler:
    """An engine whose 8 slots are taken by best-effort requests "b0", "b1", ...; ``waiting`` more are queued."""
    engine = make(seqs=8, blocks=1000)
    for number in range(8 + waiting):
        engine.add(f"b{number}", 20, 200, **xargs)
    for _ in range(4):
        engine.step()
    return engine


def test_paced_request_overtakes_all_waiting_best_effort_requests(make: Make) -> None:
    engine = full_of_best_effort(make, waiting=40)
    engine.add("paced", 20, 5, tpot_ms=50)
    for _ in range(3):
        engine.step()
    assert engine.generated["paced"] == 2, "prefilled in the first of three steps; the last one is in flight"
    assert engine.best_effort_preemptions == 1
    engine.drain()
    assert all(engine.generated[f"b{number}"] == 200 for number in range(48))


@pytest.mark.parametrize(
    ("xargs", "preemptions"),
    [
        ({"tpot_ms": 50}, 1),
        ({"tpot_ms": 3_600_000}, 1),
        ({"kind": "deadline_only"}, 1),
        ({"kind": "best_effort", "tpot_ms": 50}, 0),
        ({"kind": "unknown", "tpot_ms": 50}, 1),
        ({"kind": ["best_effort"], "tpot_ms": 50}, 1),
        ({"kind": "unknown"}, 0),
        ({}, 0),
        ({"gate": "open"}, 0),
        ({"tpot_ms": -1}, 0),
        ({"tpot_ms": float("inf")}, 0),
        ({"tpot_ms": "50"}, 0),
    ],
)
def test_kind_decides_whether_an_arrival_preempts(make: Make, xargs: dict[str, Any], preemptions: int) -> None:
    engine = full_of_best_effort(make)
    engine.add("arrival", 20, 5, **xargs)
    for _ in range(3):
        engine.step()
    assert engine.best_effort_preemptions == preemptions


@pytest.mark.parametrize(
    ("xargs", "preemptions"),
    [
        ({"kind": "best_effort", "tpot_ms": 50}, 1),
        ({"kind": "yielding", "tpot_ms": 50}, 1),
        ({"kind": "deadline_only"}, 0),
        ({"tpot_ms": 3_600_000}, 0),
        ({"gate": "credit"}, 0),
    ],
)
def test_kind_decides_whether_a_request_is_preempted(make: Make, xargs: dict[str, Any], preemptions: int) -> None:
    engine = full_of_best_effort(make, **xargs)
    engine.add("paced", 20, 5, tpot_ms=50)
    for _ in range(3):
        engine.step()
    assert engine.best_effort_preemptions == preemptions


def test_kinds_without_pace_sit_out_a_full_step(make: Make) -> None:
    engine = make(seqs=8, blocks=1000, overlap=False)
    for name, xargs in {
        "paced": {"tpot_ms": 20},
        "loose": {"tpot_ms": 2000},
        "deadline-only": {"kind": "deadline_only"},
        "waived": {"kind": "best_effort", "tpot_ms": 20},
        "best-effort": {},
    }.items():
        engine.add(name, 4, 50, **xargs)
    engine.step()
    # Decodes take 15 of 20 ms; this prompt takes 20 ms.
    engine.add("prompt", 100, 5)
    scheduled = engine.step()
    assert {"paced", "loose"} == scheduled.keys() - {"prompt"}


def test_yielding_prompts_wait_for_prompts_of_others(make: Make) -> None:
    engine = make(seqs=8, blocks=1000, budget=100, overlap=False)
    engine.add("paced", 4, 50, tpot_ms=30)
    engine.add("yielding", 4, 50, tpot_ms=30, kind="yielding")
    engine.add("yielding prompt", 300, 5, tpot_ms=50, kind="yielding")
    assert "yielding prompt" not in engine.step()
    assert "yielding prompt" in engine.step()
    # Decodes take 12 ms and this prompt 20 ms. The next token of the paced request is due in 30 ms.
    engine.add("prompt", 100, 5, tpot_ms=50)
    assert engine.step().keys() == {"paced", "yielding", "prompt"}
    engine.drain()
    assert engine.generated["yielding prompt"] == 5


def test_recomputation_is_limited_to_the_slack_of_paced_requests(make: Make) -> None:
    engine = make(seqs=3, blocks=1000, overlap=False)
    for number in range(3):
        engine.add(f"b{number}", 10, 300)
    for _ in range(150):
        engine.step()
    engine.add("long", 10, 1000, tpot_ms=30)
    engine.add("short", 10, 5, tpot_ms=30)
    steps = [engine.step() for _ in range(500)]
    assert engine.best_effort_preemptions == 2
    recomputed = [step["b1"] for step in steps if step.get("b1", 0) > 1]
    assert sum(recomputed) >= 155, "its prompt and its output"
    # Decodes take 12 of 30 ms; the rest has time for 90 tokens.
    assert max(recomputed) <= 90


def test_memory_that_was_short_is_not_returned_at_once(make: Make) -> None:
    preemptions = {}
    for gate in ("open", "slack"):
        engine = make(seqs=64, blocks=150, budget=2048)
        paced = engine.add("paced", 100, 300, tpot_ms=50, gate=gate)
        best_effort = [engine.add(f"b{number}", 60, 100, gate=gate) for number in range(30)]
        engine.drain()
        preemptions[gate] = sum(request.num_preemptions for request in best_effort)
        assert paced.num_preemptions == 0
        assert engine.best_effort_preemptions == (preemptions[gate] if gate == "slack" else 0)
    assert 0 < preemptions["slack"] <= 1.5 * preemptions["open"]


def test_report_says_whether_the_engine_preempts(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    assert make(seqs=4, blocks=100).reporter.report.preemptible
    monkeypatch.setattr("engine_adapter.vllm.scheduler.PREEMPTION_VERSIONS", ((0, 1), (0, 2)))
    old = make(seqs=1, blocks=100)
    assert not old.reporter.report.preemptible
    old.add("best-effort", 20, 30)
    old.step()
    old.add("paced", 20, 3, tpot_ms=50)
    old.drain()
    assert old.best_effort_preemptions == 0


# --- reports ----------------------------------------------------------------------------------------------------------


def test_report_counts_decodes_by_pace(make: Make) -> None:
    engine = make(seqs=8, blocks=1000, overlap=False)
    engine.add("strict", 4, 41, tpot_ms=30, gate="credit")
    engine.add("loose", 4, 40, tpot_ms=60, gate="credit")
    engine.add("unpaced", 4, 41, gate="credit")
    for _ in range(41):
        engine.step()
    report = engine.reporter.report
    assert report.eligible == {"30": 40, "60": 40, "none": 40}
    assert report.batched == {"30": 40, "60": 20, "none": 40}
    assert (report.steps, report.gated_steps) == (41, 20)


def test_report_bounds_the_number_of_pace_labels(make: Make) -> None:
    engine = make(seqs=100, blocks=1000, overlap=False)
    for number in range(60):
        engine.add(f"r{number}", 4, 3, tpot_ms=30 + number, gate="open")
    engine.drain()
    assert len(engine.reporter.report.eligible) <= 33
    assert engine.reporter.report.eligible["other"] > 0


def test_unknown_gate_in_the_environment_is_rejected(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANTARES_GATE", "nope")
    with pytest.raises(ValueError, match="ANTARES_GATE: 'nope' is not a step gate"):
        make(seqs=4, blocks=100)


def test_backlog_leaves_out_what_the_prefix_cache_holds(make: Make) -> None:
    stepped = make(seqs=4, blocks=64, caching=True)
    stepped.add("first", 200, 1)
    assert stepped.scheduler._prefill_backlog(10_000) == 200
    assert stepped.scheduler._prefill_backlog(150) == 150
    stepped.drain()
    stepped.add("same beginning", 230, 1)
    assert stepped.scheduler._prefill_backlog(10_000) == 230 - 200 // BLOCK_TOKENS * BLOCK_TOKENS
    assert stepped.step()["same beginning"] == 230 - 200 // BLOCK_TOKENS * BLOCK_TOKENS


def test_backlog_without_a_prefix_cache_is_all_waiting_tokens(make: Make) -> None:
    stepped = make(seqs=4, blocks=64)
    stepped.add("first", 200, 1)
    stepped.drain()
    stepped.add("same beginning", 230, 1)
    assert stepped.scheduler._prefill_backlog(10_000) == 230
