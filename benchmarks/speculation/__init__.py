"""Studies of speculative decoding."""
