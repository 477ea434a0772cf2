"""Models of the duration of an engine step."""
