"""Engines: in-process vLLM, remote servers, a simulated engine, and the step gate inside vLLM.

INVARIANT: this package does not import ``gateway``. ``vllm``, ``torch`` and ``transformers`` are imported only inside
the modules that need them, so that this package imports fast.
"""
