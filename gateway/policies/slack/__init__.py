"""`slack`, the default policy."""
