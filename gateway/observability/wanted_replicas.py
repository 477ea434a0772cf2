"""How many engines the traffic of the last minutes needs, for autoscalers: a metric and `GET /replicas`.

Every ``interval_s`` seconds, a child process simulates the requests of the last ``window_s`` seconds
(`lab.simulate.wanted`) on engines with the step times that the gateway has learned. It runs at the lowest priority and
with a limit on its CPU time. The event loop only copies references to the records of requests; a thread reads them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import orjson
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from engine_adapter.step_time.live_profile import live_profile
from engine_adapter.step_time.profile import profile_document
from gateway.observability.decisions import Decisions, RequestRecord
from gateway.observability.ledger import Entry
from gateway.observability.traffic_recording import NO_DEMAND, is_measured
from gateway.scheduling.engine_queue import EngineQueue

log = logging.getLogger("antares.wanted_replicas")

METRIC = "antares_wanted_replicas"

MAX_MODELS = 16
"""Models for which replicas are computed, one after the other."""

MAX_PROFILES = 8
"""Engines of a model whose step times are simulated; a larger fleet takes turns with them."""

MAX_SEQUENCES = 16
"""Sequences of one request that are simulated."""

TIMEOUT_S = 300.0
"""Seconds after which the child process is killed. It ends itself after 120 s of CPU time, which take longer if the
machine is busy."""

STALE_INTERVALS = 5
"""Intervals without an answer after which the metric disappears: an autoscaler then keeps what it has."""

COMMAND = (sys.executable, "-m", "lab.simulate.wanted")

_LENGTH = 128.0
"""Tokens of prompts that were not measured, and of answers without a prediction, if those of no request are known.
Convention."""


@dataclass(frozen=True, slots=True)
class WantedSettings:
    """``target``: share of the requests that must attain their SLO. The others are documented in the configuration."""

    enabled: bool = False
    target: float = 0.99
    window_s: float = 300.0
    interval_s: float = 60.0
    max_replicas: int = 64
    policy: str = "slack"
    options: dict[str, Any] = field(default_factory=dict)
    routing: str = "least_load"


@dataclass(slots=True)
class _Found:
    """The last answer for a model: when it was found (monotonic s), and the document of `GET /replicas`."""

    at: float
    document: dict[str, Any]


class WantedReplicas(Collector):
    """Computes the wanted replicas of each model while it runs, if that is enabled.

    ``engine_queues`` may change in place. ``settings`` are read at every interval.
    """

    def __init__(
        self,
        decisions: Decisions,
        engine_queues: Sequence[EngineQueue],
        settings: WantedSettings,
        command: Sequence[str] = COMMAND,
    ) -> None:
        self.settings = settings
        self._decisions, self._engine_queues, self._command = decisions, engine_queues, command
        self._found: dict[str, _Found] = {}
        self._error = ""
        self._since = time.monotonic()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to compute, if enabled."""
        if self.settings.enabled and self._task is None:
            self._task = asyncio.create_task(self._run(), name="wanted replicas")

    async def stop(self) -> None:
        """Stop, with the child process. Idempotent."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    def document(self) -> dict[str, Any]:
        """Return the wanted replicas of each model, and why."""
        now = time.monotonic()
        models = {model: found.document | {"age_s": round(now - found.at, 1)} for model, found in self._found.items()}
        return {"enabled": self.settings.enabled, "error": self._error or None, "models": models}

    def collect(self) -> Iterable[Metric]:
        """Return the wanted replicas of each model whose answer is recent."""
        text = "Engines with which the target share of recent requests attains its SLO, by simulation."
        family = GaugeMetricFamily(METRIC, text, labels=("model",))
        oldest = time.monotonic() - STALE_INTERVALS * self.settings.interval_s
        for model, found in list(self._found.items()):
            if found.at >= oldest:
                family.add_metric((model,), found.document["wanted"])
        yield family

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self.settings.interval_s)
            try:
                await self.compute()
                self._error = ""
            except Exception as error:
                # NOTE: whatever fails here must not stop the gateway, nor later attempts.
                self._error = f"{type(error).__name__}: {error}"[:500]
                log.warning("cannot compute the wanted replicas: %s", self._error)

    async def compute(self) -> None:
        """Compute the wanted replicas of each model now. Raises RuntimeError if the child process fails."""
        pools: dict[str, list[EngineQueue]] = {}
        for queue in self._engine_queues:
            pools.setdefault(queue.engine.state.model, []).append(queue)
        for model in self._found.keys() - pools.keys():
            del self._found[model]
        ended, entries = self._decisions.snapshot()
        demand = await asyncio.to_thread(self._demand, pools, ended, entries)
        for model, pool in list(pools.items())[:MAX_MODELS]:
            question = await asyncio.to_thread(self._question, pool, demand.get(model, ()))
            answer = orjson.loads(await self._ask(orjson.dumps(question)))
            self._found[model] = _Found(time.monotonic(), self._document(answer, question, len(pool)))

    def _demand(
        self, pools: Mapping[str, Sequence[EngineQueue]], ended: Sequence[RequestRecord], entries: Sequence[Entry]
    ) -> dict[str, list[RequestRecord]]:
        """Return the requests of the window that engines would serve, by the key of their pool.

        A request belongs to the pool of its engine. If that engine has left, or the request was rejected before it had
        one, it belongs to a pool that serves its model: else the demand would fall with the number of engines.
        """
        now = time.monotonic()
        since = now - self.settings.window_s
        of_engine = {queue.engine.name: key for key, queues in pools.items() for queue in queues}
        of_model = {key: key for key in pools}
        for key, queues in pools.items():
            for queue in queues:
                for model in queue.engine.state.models or ():
                    of_model.setdefault(model, key)
        demand: dict[str, list[RequestRecord]] = {}
        open_requests = (RequestRecord.of(entry, 0, now) for entry in entries if entry.request.arrival_s >= since)
        for record in chain(ended, open_requests):
            pool = of_engine.get(record.engine, of_model.get(record.model))
            if pool is not None and record.arrival_s >= since and record.reason not in NO_DEMAND:
                demand.setdefault(pool, []).append(record)
        return demand

    def _question(self, pool: Sequence[EngineQueue], records: Sequence[RequestRecord]) -> dict[str, Any]:
        """Return the question of `lab.simulate.wanted` about ``records``, the requests of ``pool``."""
        settings, classes = self.settings, pool[0].classes
        finished = [record for record in records if record.outcome == "finished"]
        usual = sum(_length(record) for record in finished) / len(finished) if finished else _LENGTH
        measured = [_computed_prompt(record) for record in records if is_measured(record)]
        usual_prompt = round(sum(measured) / len(measured)) if measured else _LENGTH
        rows: list[list[Any]] = []
        for record in records:
            predicted = (record.predicted_tokens if record.prediction_source else 0.0) or usual
            output = _length(record) if record.outcome == "finished" else predicted
            prompt = _computed_prompt(record) if is_measured(record) else usual_prompt
            bounds = (record.slo.ttft_s, record.slo.tpot_s, record.slo.e2e_s)
            slo_class = classes.get(record.slo_class)
            best_effort = slo_class is not None and slo_class.on_unattainable == "best_effort"
            row: list[Any] = [record.arrival_s, prompt, output, *bounds, predicted, record.predicted_p90, best_effort]
            rows += [row] * min(max(1, record.sequences), MAX_SEQUENCES)
        rows.sort(key=lambda row: row[0])
        first_s = rows[0][0] if rows else 0.0
        return {
            "requests": [[row[0] - first_s, *row[1:]] for row in rows],
            # Engines of one kind are often next to each other.
            "profiles": [_profile(queue) for queue in pool[:: -(-len(pool) // MAX_PROFILES)]],
            "policy": settings.policy,
            "options": settings.options,
            "routing": settings.routing,
            "target": settings.target,
            "first": max(1, len(pool)),
            "most": settings.max_replicas,
        }

    async def _ask(self, question: bytes) -> bytes:
        process = await asyncio.create_subprocess_exec(
            *self._command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
        )
        try:
            async with asyncio.timeout(TIMEOUT_S):
                answer, errors = await process.communicate(question)
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        if process.returncode != 0:
            last = errors.decode(errors="replace").strip().rpartition("\n")[2]
            raise RuntimeError(f"the simulation ended with code {process.returncode}: {last[:300]}")
        return answer

    def _document(self, answer: dict[str, Any], question: dict[str, Any], engines: int) -> dict[str, Any]:
        target, window_s = self.settings.target, self.settings.window_s
        now = time.monotonic()
        observed_s = now - max(now - window_s, self._since, self._decisions.known_since_s)
        tried = ", ".join(
            f"{share:.1%} with {count}" for count, share in sorted(answer["tried"].items(), key=_by_count)
        )
        why = f"of {answer['requests']} requests in the last {window_s:g} s, the target is {target:.1%}"
        if not answer["requests"]:
            why = "no requests in the window that an engine can attain"
        elif tried:
            why += f"; simulated: {tried}"
            why += " (of a sample, scaled up)" if answer["sampled"] < 1 else ""
        if answer["saturated"]:
            why += "; more engines would be idle, so they do not help"
        if not answer["held"]:
            why += "; max_replicas do not attain it"
        if answer["infeasible"]:
            why += f"; {answer['infeasible']} requests do not count, because an idle engine misses their bounds"
        return {
            "wanted": answer["wanted"],
            "engines": engines,
            "target": target,
            "window_s": window_s,
            "requests_per_second": round(len(question["requests"]) / max(1.0, observed_s), 3),
            "why": why,
            **{key: answer[key] for key in ("requests", "infeasible", "sampled", "saturated", "held", "cpu_s")},
        }


def _by_count(item: tuple[str, float]) -> int:
    return int(item[0])


def _computed_prompt(record: RequestRecord) -> int:
    return max(1, record.prompt_tokens - (record.cached_tokens or 0))


def _length(record: RequestRecord) -> float:
    return record.output_tokens / max(1, record.sequences)


def _profile(queue: EngineQueue) -> dict[str, Any]:
    state = queue.engine.state
    profile = live_profile(
        queue.engine.name,
        state.step_time.curve,
        max_num_seqs=state.max_num_seqs,
        max_num_batched_tokens=state.max_num_batched_tokens,
        max_model_len=state.max_model_len,
        # An engine that does not report its KV memory is taken to have enough for half of its slots.
        kv_tokens=state.kv_tokens or state.max_num_seqs * state.max_model_len // 2,
        plans_ahead=state.plans_ahead,
    )
    return profile_document(profile)
