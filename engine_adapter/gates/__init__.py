"""Step gates: who decodes in the next engine step, and how many prefill tokens join."""
