"""Models of how long an engine step takes."""
