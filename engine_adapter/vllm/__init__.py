"""vLLM in this process: the engine, the scheduler class that runs inside it, and how both start."""
