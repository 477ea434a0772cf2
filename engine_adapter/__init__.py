"""Everything that knows an engine: in-process vLLM, remote servers, a simulated one, and the step gate inside vLLM.

Nothing here imports ``gateway``. ``vllm``, ``torch`` and ``transformers`` are imported only inside the modules that
need them, so that importing this package costs nothing.
"""
