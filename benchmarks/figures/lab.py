"""Where the figures' runs are made: processes that share the work, and a bar that shows how far they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from lab.simulate.experiment import Experiment, Run, perform

Task = TypeVar("Task")
Result = TypeVar("Result")

DROPPED = ("per_class", "failed", "finished", "wall_s", "scheduling_s", "setup_s", "decisions")
"""Of a run record: what no figure shows, and wall-clock times, so that the same code writes the same file again."""


@dataclass(slots=True)
class Lab:
    """``pool`` None: everything in this process. ``begin(text, n)`` and ``advance()`` tell of progress."""

    pool: Executor | None
    begin: Callable[[str, int], None] = lambda text, n: None
    advance: Callable[[], None] = lambda: None

    def each(self, what: str, work: Callable[[Task], Result], tasks: Sequence[Task]) -> list[Result]:
        """``work`` of every task, in order. ``work`` must be a function of a module."""
        self.begin(what, len(tasks))
        results = []
        for result in self.pool.map(work, tasks) if self.pool else map(work, tasks):
            results.append(result)
            self.advance()
        return results

    def runs(self, what: str, tasks: Sequence[tuple[Experiment, Run]]) -> list[dict[str, Any]]:
        """A record (`lab.records.run_record`, shortened) of every run, with what tells experiments apart."""
        return self.each(what, record_of, tasks)


def record_of(task: tuple[Experiment, Run]) -> dict[str, Any]:
    """The record of one run."""
    experiment, run = task
    record = perform(experiment, run)
    return described(experiment) | {key: value for key, value in record.items() if key not in DROPPED}


def described(experiment: Experiment) -> dict[str, Any]:
    """What a record must say of its experiment."""
    asked = {key: value for key, value in experiment.workload.items() if value is not None}
    return {
        "profile": experiment.profile,
        "step_mode": experiment.step_mode,
        **experiment.limits,
        "workload": asked.pop("name"),
        "asked": asked,
        "predictor": experiment.predictor,
    }


@contextmanager
def laboratory(jobs: int) -> Iterator[Lab]:
    """A lab of ``jobs`` processes, its progress on stderr."""
    console = Console(stderr=True, highlight=False)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("")

        def begin(what: str, tasks: int) -> None:
            progress.reset(bar, total=tasks, description=what)

        lab = Lab(None, begin, lambda: progress.advance(bar))
        if jobs <= 1:
            yield lab
            return
        # Spawned, because the bar has a thread of its own, and forking beside a thread may hang.
        with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
            lab.pool = pool
            yield lab
