"""Runs the simulations of the figures in several processes, with a progress bar."""

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

OMITTED_FIELDS = ("per_class", "failed", "finished", "wall_s", "scheduling_s", "setup_s", "decisions")
"""Fields of a run record that no figure shows, and wall-clock times, which differ from run to run.

Without them the same code and seed write the same file."""


@dataclass(slots=True)
class Lab:
    """Runs tasks in ``pool``, or in this process if ``pool`` is None.

    ``begin(text, n)`` and ``advance()`` report progress.
    """

    pool: Executor | None
    begin: Callable[[str, int], None] = lambda text, n: None
    advance: Callable[[], None] = lambda: None

    def each(self, what: str, work: Callable[[Task], Result], tasks: Sequence[Task]) -> list[Result]:
        """``work(task)`` for each task, in order. ``work`` must be a function of a module, so that it pickles."""
        self.begin(what, len(tasks))
        results = []
        for result in self.pool.map(work, tasks) if self.pool else map(work, tasks):
            results.append(result)
            self.advance()
        return results

    def runs(self, what: str, tasks: Sequence[tuple[Experiment, Run]]) -> list[dict[str, Any]]:
        """The shortened run record (`lab.records.run_record`) of each run, with the fields of its experiment."""
        return self.each(what, record_of, tasks)


def record_of(task: tuple[Experiment, Run]) -> dict[str, Any]:
    """The record of one run."""
    experiment, run = task
    return experiment_fields(experiment) | shortened(perform(experiment, run))


def shortened(record: dict[str, Any]) -> dict[str, Any]:
    """``record`` without `OMITTED_FIELDS`."""
    return {key: value for key, value in record.items() if key not in OMITTED_FIELDS}


def experiment_fields(experiment: Experiment) -> dict[str, Any]:
    """The fields that tell the experiments of one document apart."""
    options = {key: value for key, value in experiment.workload.items() if value is not None}
    return {
        "profile": experiment.profile,
        "step_mode": experiment.step_mode,
        **experiment.limits,
        "workload": options.pop("name"),
        "workload_options": options,
        "predictor": experiment.predictor,
    }


@contextmanager
def laboratory(jobs: int) -> Iterator[Lab]:
    """A `Lab` of ``jobs`` processes that shows progress on stderr."""
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
        # NOTE: spawn, not fork: the progress bar has a thread, and a fork beside a running thread can deadlock.
        with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
            lab.pool = pool
            yield lab
