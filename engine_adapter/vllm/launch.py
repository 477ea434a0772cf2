"""Creates an AsyncLLM from the configuration: environment, command line, engine. Shuts it down again.

Creating blocks, so it runs in a thread.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
from collections.abc import Callable, Sequence
from multiprocessing import resource_tracker
from typing import Any

from engine_adapter.engine import EngineStartError
from engine_adapter.vllm.gate_channel import SOCKET_ENV
from engine_adapter.vllm.models import resolve_model
from engine_adapter.vllm.orphan import PARENT_ENV

SCHEDULER = "engine_adapter.vllm_scheduler.SloScheduler"
"""Default of vLLM's ``--scheduler-cls``."""


def prepare_environment(gate_socket: str, gate: str) -> None:
    """Set the environment variables that the EngineCore, a child process, inherits."""
    os.environ[SOCKET_ENV] = gate_socket
    os.environ[PARENT_ENV] = str(os.getpid())
    os.environ["ANTARES_GATE"] = gate
    # vLLM logs to standard output by default; the gateway reserves it for the output of commands.
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    # NOTE: never fork a running gateway. The child would inherit its sockets and its threads' locked locks.
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")


def command_line(model: str, served_model_names: Sequence[str], flags: dict[str, Any]) -> list[str]:
    """Arguments of `vllm serve` for a configuration.

    ``flags`` are named without dashes. True becomes ``--flag``, False ``--no-flag``; None leaves the flag out.
    A mapping becomes JSON.
    """
    all_flags: dict[str, Any] = {"scheduler-cls": SCHEDULER, **flags, "model": resolve_model(model)}
    if served_model_names:
        all_flags["served-model-name"] = list(served_model_names)
    arguments: list[str] = []
    for flag, value in all_flags.items():
        if value is True:
            arguments.append(f"--{flag}")
        elif value is False:
            arguments.append(f"--no-{flag}")
        elif isinstance(value, list):
            arguments += [f"--{flag}", *map(str, value)]
        elif isinstance(value, dict):
            arguments += [f"--{flag}", json.dumps(value)]
        elif value is not None:
            arguments += [f"--{flag}", str(value)]
    return arguments


def create_llm(arguments: list[str], on_stats: Callable[[Any], None], stopped: Callable[[], bool]) -> tuple[Any, Any]:
    """Create an AsyncLLM, and return it with vLLM's parsed arguments. Takes tens of seconds.

    Args:
        arguments: arguments of `vllm serve`.
        on_stats: called at every step with vLLM's scheduler statistics.
        stopped: becomes true when the gateway stops during the start.

    Raises:
        EngineStartError: vLLM could not start (the message says what to fix), or ``stopped()`` became true.
    """
    try:
        import vllm
    except ImportError as error:
        raise EngineStartError(
            "engines: kind is 'vllm', but vLLM is not importable "
            f"({error}). Run `make install` for vLLM on CPU or `pip install -e '.[gpu]'` in your clone for GPUs, "
            "or run vLLM as a server and use kind: http."
        ) from error
    from engine_adapter.vllm.features import Part, UnsupportedFeatureError, check
    from engine_adapter.vllm.versions import UnsupportedVllmError, require_in_process

    try:
        require_in_process(vllm.__version__)
    except UnsupportedVllmError as error:
        raise EngineStartError(str(error)) from error
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser
    from vllm.v1.engine.async_llm import AsyncLLM

    # A terminal sends Ctrl-C to every process of its group. Only the gateway may act on it: it drains, then stops its
    # engine. A child process inherits the signal mask of the thread that starts it, so SIGINT is blocked here.
    # NOTE: the resource tracker must start first, because multiprocessing unblocks SIGINT when it starts the tracker.
    resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        args = make_arg_parser(FlexibleArgumentParser()).parse_args(arguments)
        validate_parsed_serve_args(args)
        config = AsyncEngineArgs.from_cli_args(args).create_engine_config()
        check(config, Part.IN_PROCESS)
        if stopped():
            raise EngineStartError("the engine was stopped during its start")
        return AsyncLLM.from_vllm_config(config, stat_loggers=[_stat_logger(on_stats)]), args
    except SystemExit as error:
        raise EngineStartError("vLLM rejected engines: flags; the lines above name the flag and the reason") from error
    except EngineStartError:
        raise
    except UnsupportedFeatureError as error:
        raise EngineStartError(str(error)) from error
    except Exception as error:
        raise EngineStartError(f"vLLM could not start: {error}") from error
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


async def shut_down(llm: Any) -> None:
    """Shut down ``llm``, an AsyncLLM, and end its requests with vLLM's `EngineDeadError`."""
    from vllm.v1.engine.exceptions import EngineDeadError

    # End all requests that still wait for tokens, because no output task will do so after the shutdown.
    llm.output_processor.propagate_error(EngineDeadError())
    if llm.output_handler is not None:
        llm.output_handler.cancel()  # otherwise it reports the shutdown as an engine failure
    await asyncio.sleep(0)
    await asyncio.to_thread(llm.shutdown)
    # NOTE: vLLM's destructor calls shutdown() again, which logs errors while the interpreter exits.
    llm.shutdown = _already_shut_down


def _already_shut_down(timeout: float | None = None) -> None:
    """Replaces `AsyncLLM.shutdown` once it has run."""


def freeze_heap() -> None:
    """Exclude all current objects from garbage collection.

    NOTE: vLLM's import and start create many long-lived objects. A full collection that scans them stops the event
    loop, and with it every stream, for most of a second. It runs once here to free the objects of an engine that died.
    """
    gc.unfreeze()
    gc.collect()
    gc.freeze()


def _stat_logger(on_stats: Callable[[Any], None]) -> Any:
    from vllm.v1.metrics.loggers import StatLoggerBase

    class Forward(StatLoggerBase):  # type: ignore[misc]
        """Forwards vLLM's scheduler statistics to ``on_stats``."""

        def __init__(self, vllm_config: Any, engine_index: int = 0) -> None: ...

        def record(self, scheduler_stats: Any, iteration_stats: Any, *args: Any, **kwargs: Any) -> None:
            if scheduler_stats is not None:
                on_stats(scheduler_stats)

        def log_engine_initialized(self) -> None: ...

    return Forward
