"""Studies of the `slack` policy."""
