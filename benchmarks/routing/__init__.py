"""Which engine a request goes to: the routing policies of the gateway, simulated."""
