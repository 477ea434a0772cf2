"""A gateway in one process, or in several that share a port (docs/scale.md). `run.py` decides which."""
