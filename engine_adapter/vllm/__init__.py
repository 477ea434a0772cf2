"""In-process vLLM: the engine, its launch, and the scheduler class that runs inside it."""
