"""Studies of several engines behind one gateway."""
