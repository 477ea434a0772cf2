"""OpenAI servers, such as vLLM's, as actors of a Ray cluster. Needs the extra `ray`."""
