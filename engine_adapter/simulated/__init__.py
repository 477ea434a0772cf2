"""A simulated engine with vLLM's step loop and OpenAI routes."""
