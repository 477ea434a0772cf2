"""From configuration to a running AsyncLLM: environment, command line, creation. Blocking; runs in a thread."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from multiprocessing import resource_tracker
from typing import Any

from engine_adapter.engine import EngineStartError
from engine_adapter.vllm.gate_channel import SOCKET_ENV
from engine_adapter.vllm.models import resolve_model
from engine_adapter.vllm.orphan import PARENT_ENV

SCHEDULER = "engine_adapter.vllm_scheduler.SloScheduler"


def prepare_environment(gate_socket: str, gate: str) -> None:
    """Set what the EngineCore, a child process, inherits."""
    os.environ[SOCKET_ENV] = gate_socket
    os.environ[PARENT_ENV] = str(os.getpid())
    os.environ["ANTARES_GATE"] = gate
    # vLLM logs to standard output unless told otherwise; ours is for what a command was asked to print.
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    # Never fork a running gateway: the child would hold its sockets, and its threads' locks for ever.
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")


def command_line(model: str, served_model_name: str | None, flags: dict[str, Any]) -> list[str]:
    """The arguments of `vllm serve` that mean the same. ``flags`` have no dashes; False becomes ``--no-flag``."""
    all_flags: dict[str, Any] = {"scheduler-cls": SCHEDULER, **flags, "model": resolve_model(model)}
    if served_model_name:
        all_flags["served-model-name"] = served_model_name
    line: list[str] = []
    for flag, value in all_flags.items():
        if value is True:
            line.append(f"--{flag}")
        elif value is False:
            line.append(f"--no-{flag}")
        elif isinstance(value, list):
            line += [f"--{flag}", *map(str, value)]
        elif value is not None:
            line += [f"--{flag}", str(value)]
    return line


def create_llm(arguments: list[str], on_stats: Callable[[Any], None], stopped: Callable[[], bool]) -> tuple[Any, Any]:
    """An AsyncLLM and vLLM's parsed arguments; ``on_stats`` gets its scheduler statistics at every step.

    Takes tens of seconds. Raises `EngineStartError` with what to fix, or because ``stopped()`` became true.
    """
    try:
        import vllm
    except ImportError as missing:
        raise EngineStartError(
            "engine.kind is 'vllm' but vLLM is not importable "
            f"({missing}). Run `make install` for vLLM on CPU or `pip install 'antares-gateway[gpu]'` for GPUs."
        ) from missing
    from engine_adapter.vllm.versions import IN_PROCESS_VERSIONS, UnsupportedVllmError, require

    try:
        require(vllm.__version__, IN_PROCESS_VERSIONS, "The in-process engine")
    except UnsupportedVllmError as unsupported:
        raise EngineStartError(str(unsupported)) from unsupported
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser
    from vllm.v1.engine.async_llm import AsyncLLM

    # Ctrl-C goes to every process of the terminal's group, but only the gateway may act on it: it drains first and then
    # stops its engine. A process inherits the signal mask of the thread that starts it. (The resource tracker comes
    # first: multiprocessing unblocks SIGINT when it starts that one.)
    resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        args = make_arg_parser(FlexibleArgumentParser()).parse_args(arguments)
        validate_parsed_serve_args(args)
        config = AsyncEngineArgs.from_cli_args(args).create_engine_config()
        if stopped():
            raise EngineStartError("the engine was stopped while it started")
        return AsyncLLM.from_vllm_config(config, stat_loggers=[_stat_logger(on_stats)]), args
    except SystemExit as bad_flag:
        raise EngineStartError("vLLM refused engine.flags; the lines above say which flag and why") from bad_flag
    except EngineStartError:
        raise
    except Exception as failed:
        raise EngineStartError(f"vLLM could not start: {failed}") from failed
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def _stat_logger(on_stats: Callable[[Any], None]) -> Any:
    from vllm.v1.metrics.loggers import StatLoggerBase

    class Forward(StatLoggerBase):  # type: ignore[misc]
        """Hands vLLM's scheduler statistics on."""

        def __init__(self, vllm_config: Any, engine_index: int = 0) -> None: ...

        def record(self, scheduler_stats: Any, iteration_stats: Any, *args: Any, **kwargs: Any) -> None:
            if scheduler_stats is not None:
                on_stats(scheduler_stats)

        def log_engine_initialized(self) -> None: ...

    return Forward
