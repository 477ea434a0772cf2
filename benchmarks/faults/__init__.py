"""Studies of engines that fail: how many requests are lost, and how long until traffic leaves and returns."""
