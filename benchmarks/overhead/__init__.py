"""What the gateway and its scheduler cost."""
