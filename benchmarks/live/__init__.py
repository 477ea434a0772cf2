"""Studies on a real vLLM on CPU."""
