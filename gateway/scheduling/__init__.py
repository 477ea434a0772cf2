"""One queue per engine, the routing between engines, and the admission that applies a policy's decisions."""
